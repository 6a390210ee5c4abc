"""The manifest of a finished stage: written last, with the checksum of every result."""

from pathlib import Path

from .files import PARTIAL, CheckpointError, checksums, read_json, remove, remove_partial, write_json
from .hashing import is_unchanged, seal_of
from .untrusted import path_inside

FORMAT = 1  # of manifest.json; raised when its layout changes
RESUMED_FROM = ("checkpoints", "rows")  # folders that a stage goes on from; rows are an evaluation's
BEGUN = "checkpoints/begun.json"  # of a stage that is not finished: what it is and what it is made from
# Not results, or checked elsewhere: store.json holds the checksums of a store's shards, and its reader compares them.
UNHASHED = (
    "manifest.json",
    ".lock",
    "checkpoints/*",
    "rows/*",
    "tensorboard/*",
    "log.jsonl",
    "samples/*",
    "shard-*",
    "nonfinite-*",
)


def finish(folder: Path, manifest: dict) -> None:
    """Mark a stage's folder as finished: write its manifest, with the checksum of every result, as the last file."""
    manifest = {"format": FORMAT, **manifest, "files": checksums(folder, skip=UNHASHED)}
    write_json(folder / "manifest.json", manifest | {"seal": seal_of(manifest)})
    sweep(folder)  # after the manifest: a stage that is killed in between would else begin again


def unswept(folder: Path) -> bool:
    """Return whether a finished stage's folder still has what `sweep` deletes: its process was killed before that."""
    return any((folder / name).exists() for name in RESUMED_FROM) or any(folder.rglob(f".*{PARTIAL}"))


def sweep(folder: Path) -> None:
    """Delete partial files, checkpoints and rows of a finished stage."""
    remove_partial(folder)
    for name in RESUMED_FROM:
        remove(folder / name)


def is_finished(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def verify(folder: Path) -> dict:
    """Return the manifest of a finished stage after checking that its files are all there and unchanged.

    Raise CheckpointError with the first file that is missing or has another checksum.
    """
    manifest = read_json(folder / "manifest.json", files=dict)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} was written in format {manifest.get('format')}, this version reads {FORMAT}: "
            "delete the folder to run the stage again"
        )
    if manifest.pop("seal", None) not in (None, seal_of(manifest)):  # older manifests have no seal
        raise CheckpointError(f"{folder}/manifest.json is damaged: delete {folder} to run the stage again")
    for name, expected in manifest["files"].items():
        path = path_inside(folder, name, folder / "manifest.json")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: delete {folder} to run the stage again")
        if not is_unchanged(path, expected):
            raise CheckpointError(f"{path} is damaged (its sha256 changed): delete {folder} to run the stage again")
    return manifest
