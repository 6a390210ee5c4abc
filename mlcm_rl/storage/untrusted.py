"""Reading files that may come from anyone: within limits of size, and only paths inside their own folder.

Every function raises ValueError with a message for the user. Nothing here imports torch.
"""

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 2**28  # of a recipe, a manifest, a prompt file: far above any real one, far below a machine's memory

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80  # other: bytes too


def brief(value: object) -> str:
    """Return the repr of `value`, shortened in its middle: a file may hold megabytes where a word belongs."""
    return _REPR.repr(value)


def in_a_line(error: BaseException) -> str:
    """Return the kind of `error` and the first line of its message."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first}"


def first_few(texts: Sequence[str], count: int = 5) -> str:
    """Return the first `count` of `texts` in one line, with the number of the others."""
    more = [f"and {len(texts) - count} more"] if len(texts) > count else []
    return "; ".join([*texts[:count], *more])


class Faults:
    """A collection of errors, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect a ValueError that is raised inside, and go on."""
        try:
            yield
        except ValueError as error:
            self.texts.append(str(error))

    def raise_all(self) -> None:
        """Raise ValueError with the first few faults and how many more there are, if there are any."""
        if self.texts:
            raise ValueError(first_few(self.texts))


def regular(path: Path) -> Path:
    """Return `path` if it is a file or a folder.

    Raise ValueError for a pipe, a socket or a device, which a reader would wait for or read without end, and
    FileNotFoundError.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: a pipe, a socket or a device, where a file or a folder is expected")
    return path


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of the file `path`. Raise ValueError for more than `limit` bytes, and FileNotFoundError."""
    with regular(path).open("rb") as file:
        content = file.read(limit + 1)  # not by its size: that may change before the read, and a device has none
    if len(content) > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes, which no such file has")
    return content


def parse_json(text: str) -> Any:
    """Return the value of the JSON `text`.

    Raise ValueError if it is not JSON, is nested too deeply, is not Unicode, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that is read here: nested too deeply") from error
    except ValueError as error:  # thousands of digits, a duplicate key
        raise ValueError(f"not JSON that is read here: {error}") from error
    if "\\u" in text and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError("not Unicode: it holds half a surrogate pair")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise ValueError for a duplicate key: readers differ in which value they take."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        duplicate = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {duplicate[:40]!r} is given twice")
    return mapping


def is_unicode(text: str) -> bool:
    """Return whether `text` can be written as UTF-8. Half a surrogate pair, which JSON and shells accept, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_inside(folder: Path, name: object, where: object) -> Path:
    """Return the path of the file `name` in `folder`, for a name that was read from data.

    Raise ValueError, beginning with `where`, if it is not a file name or leads out of the folder: as an absolute path,
    through `..`, or over a link.
    """
    if not isinstance(name, str) or not name or "\0" in name or not is_unicode(name):
        raise ValueError(f"{where}: expected the name of a file, got {brief(name)}")
    path = folder / name
    if os.path.isabs(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {brief(name)} leads out of {folder}; what is read must lie in it")
    return path
