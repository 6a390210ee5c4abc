"""What a stage leaves on disk: files that appear by rename, a manifest written last, and checkpoints to resume from."""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import finite
from .atomic import PARTIAL, CheckpointError, remove, remove_partial, replacing, require_space
from .hashing import folder_hash, sha256
from .recipe import Teacher
from .untrusted import held, parse_json, read_bytes

FORMAT = 1  # of manifest.json; raised when its layout changes
STATE_FORMAT = 2  # of checkpoints
MAX_HEADER = 10**8  # bytes, of a safetensors file: the format's own limit


# ---- files ----


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        try:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise CheckpointError(f"{path} was not written: it would hold NaN or infinity") from error
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """The object in `path`; `kinds` are keys that it must have, and what their values must be.

    Raises CheckpointError where it is missing, not such an object, or longer than any that is written here.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        found = parse_json(read_bytes(path).decode("utf-8"))
    except ValueError as error:  # not UTF-8 too
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:  # True is no number here
            raise CheckpointError(
                f"{path} is damaged: {name} must be of type {kind.__name__}, is {reprlib.repr(found.get(name))}"
            )
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError where it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        refuse_twice(path)
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def refuse_twice(path: Path) -> None:
    """Raise ValueError for a safetensors header that is no JSON or has a name twice, of which readers take either."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MAX_HEADER))
    parse_json(header.decode("utf-8"))


def load_weights(network: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give `network` the `tensors` of the file `path` for its own. Raises CheckpointError where they are another's."""
    if odd := misfits(tensors, network.state_dict()):
        raise CheckpointError(f"{path}: {len(odd)} tensors do not fit the network, for example {odd[0]}")
    network.load_state_dict(tensors, assign=True)


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names that only one of two sets of tensors has, or under which their shapes differ."""
    shapes = [{name: value.shape for name, value in tensors.items()} for tensors in (found, expected)]
    return sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, from its header. Raises CheckpointError as `read_tensors`."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        refuse_twice(path)
        with safe_open(path, "pt") as file:  # compares the header with the file's size
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, may_lack: bool = False
) -> None:
    """Save `tensors` as safetensors, on the CPU and contiguous; with `may_lack` NaN may stand where there is no value.

    The same tensors and metadata are the same bytes. Raises CheckpointError where the disk is too full, and for NaN or
    infinity.
    """
    if not may_lack and (name := finite.first_nonfinite(tensors)) is not None:
        raise CheckpointError(f"{path} was not written: {name} is not made of finite numbers")
    with replacing(path) as temporary:
        require_space(path, sum(value.numel() * value.element_size() for value in tensors.values()))
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        if metadata and len(metadata) > 1:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: the library writes it in one drawn at random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def checksums(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every file under `folder`, by relative path, but for those that match a pattern of `skip`."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in names.items() if not any(fnmatch(name, pattern) for pattern in skip)}


def teacher_hash(teacher: Teacher) -> str:
    """Identity of a teacher's weights and configuration: one sha256 over every file's, or the pinned revision."""
    folder = Path(teacher.path)
    if not folder.is_dir():
        return f"{teacher.path}@{teacher.revision}"
    return folder_hash(folder)


# ---- what others may read ----


def public(value: Any) -> Any:
    """`value` for others to read: of paths that only this machine has, and that may name its user, the last part."""
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    path = Path(value) if isinstance(value, str) else Path()
    return path.name if path.is_absolute() or ".." in path.parts else value


def forget_origin(folder: Path) -> None:
    """Take the place that diffusers loaded each part from out of the configurations under `folder`."""
    for path in [*folder.rglob("model_index.json"), *folder.rglob("*config.json")]:
        content = read_json(path)
        if content.pop("_name_or_path", None) is not None:
            write_json(path, content)


# ---- finished stages ----

RESUMED_FROM = ("checkpoints", "rows")  # the second an evaluation's
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
    """Mark a stage's folder as finished: its manifest, with the checksum of every result, is the last file written."""
    manifest = {"format": FORMAT, **manifest, "files": checksums(folder, skip=UNHASHED)}
    write_json(folder / "manifest.json", manifest | {"seal": _seal(manifest)})
    sweep(folder)  # not before: a stage killed here would begin again


def unswept(folder: Path) -> bool:
    """Return whether a finished stage's folder still holds what `sweep` removes: its process was killed before that."""
    return any((folder / name).exists() for name in RESUMED_FROM) or any(folder.rglob(f".*{PARTIAL}"))


def sweep(folder: Path) -> None:
    """Delete what a finished stage would have gone on from."""
    remove_partial(folder)
    for name in RESUMED_FROM:
        remove(folder / name)


def is_finished(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def verify(folder: Path) -> dict:
    """The manifest of a finished stage whose files are all there and unchanged.

    Raises CheckpointError naming the first file that is missing or differs from what was written.
    """
    manifest = read_json(folder / "manifest.json", files=dict)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} was written in format {manifest.get('format')}, this version reads {FORMAT}: "
            "delete the folder to run the stage again"
        )
    if manifest.pop("seal", None) not in (None, _seal(manifest)):  # older ones have none
        raise CheckpointError(f"{folder}/manifest.json is damaged: delete {folder} to run the stage again")
    for name, expected in manifest["files"].items():
        path = held(folder, name, folder / "manifest.json")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: delete {folder} to run the stage again")
        if sha256(path) != expected:
            raise CheckpointError(f"{path} is damaged (its sha256 changed): delete {folder} to run the stage again")
    return manifest


# ---- checkpoints to resume from ----


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], record: dict | None = None, keep: int = 2) -> Path:
    """Write the state after `step` steps as `checkpoints/step-<n>`; the newest `keep` stay.

    `record` is what else a loop must know to go on, as JSON.

    The folder appears by rename with its checksums inside; older ones go only after it is there.
    """
    path = state_path(folder, step)
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        write_tensors(temporary / "state.safetensors", tensors)
        checksum = sha256(temporary / "state.safetensors")
        state = {"format": STATE_FORMAT, "step": step, "sha256": checksum, "record": record or {}}
        write_json(temporary / "state.json", state | {"seal": _seal(state)})
    for old in checkpoints(folder)[:-keep]:
        remove(old)
    return path


def load_state(folder: Path) -> tuple[int, dict[str, Tensor], dict] | None:
    """The newest checkpoint of a stage's folder: steps done, tensors on the CPU, record; None where there is none.

    Raises CheckpointError where it is damaged: nothing restarts from zero, or from an older state, in silence.
    """
    found = checkpoints(folder)
    if not found:
        return None
    wrong = damage(found[-1])
    if wrong:
        whole = next((path for path in reversed(found[:-1]) if not damage(path)), None)
        instead = f"the one before it, {whole.name}" if whole else "the start of the stage, since no other is whole"
        raise CheckpointError(f"{found[-1]} is damaged ({wrong}): `mlcm run --skip-damaged` goes on from {instead}")
    state = read_json(found[-1] / "state.json", step=int, record=dict)
    return state["step"], read_tensors(found[-1] / "state.safetensors"), state["record"]


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint `path`; None where it is whole."""
    try:
        state = read_json(path / "state.json", sha256=str)
    except CheckpointError as error:
        return str(error)
    seal = state.pop("seal", None)
    if state.get("format") != STATE_FORMAT:
        return f"it is of format {state.get('format')}, this version reads {STATE_FORMAT}"
    if seal != _seal(state):
        return "state.json is not as it was written"
    tensors = path / "state.safetensors"
    return None if tensors.is_file() and sha256(tensors) == state["sha256"] else f"{tensors.name} is not as written"


def skip_damaged(folder: Path) -> list[str]:
    """Put the damaged checkpoints above the newest whole one aside, as `damaged-step-<n>`; returns what was wrong."""
    skipped = []
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if not wrong:
            break
        remove(path.with_name(f"damaged-{path.name}"))
        path.rename(path.with_name(f"damaged-{path.name}"))
        skipped.append(f"{path}: {wrong}")
    return skipped


def state_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / "checkpoints" / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage's folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def step_of(path: Path) -> int:
    """Return the number of steps after which the checkpoint `path` was written."""
    return int(path.name.removeprefix("step-"))


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors: `optimizer.<parameter index>.<name>`. Rates are functions of the step."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took. Raises ValueError where it was taken of other parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in taken("optimizer", tensors).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state.items():  # torch takes moments of any shape, and fails or broadcasts at the next step
        shapes = {value.shape for value in entry.values() if value.ndim}
        if index >= len(parameters) or shapes - {parameters[index].shape}:
            raise ValueError(f"the optimiser's state number {index} is of another parameter")
        for name, value in entry.items():  # fused AdamW reads a moment in its parameter's own order of memory
            if value.ndim:
                entry[name] = torch.empty_like(parameters[index], dtype=value.dtype, device=value.device).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_training(
    folder: Path, shapes: dict[str, dict[str, torch.Size]], parts: Iterable[str] = ()
) -> tuple[int, dict[str, Tensor], dict] | None:
    """The newest checkpoint in `folder`: steps done, tensors, record; None where there is none.

    Raises CheckpointError where it holds weights of other `shapes`, by group and name, no state of the optimiser, or
    nothing of one of `parts` in its record: training would go on, and end elsewhere.
    """
    found = load_state(folder)
    if found is None:
        return None
    steps, tensors, record = found
    place = checkpoints(folder)[-1]
    for prefix, group in shapes.items():
        if {name: value.shape for name, value in taken(prefix, tensors).items()} != group:
            raise CheckpointError(f"{place} holds other weights than this {prefix}: delete checkpoints/")
    missing = [name for name in parts if name not in record]
    if steps and not taken("optimizer", tensors):
        missing.append("optimizer")
    if missing:
        raise CheckpointError(f"{place} holds nothing of {', '.join(missing)} to go on from: delete checkpoints/")
    return steps, tensors, record


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `prefix.` before every name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `tensors` under `prefix.`, without it: the inverse of `named`."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
