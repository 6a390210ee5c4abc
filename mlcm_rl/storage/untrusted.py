"""Files that somebody else may have written: read within limits, and what they name is held inside their folder.

Every function raises ValueError in words. Nothing here imports torch.
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

MAX_TEXT_BYTES = 2**28  # of a recipe, a manifest, a prompt file: far above any real one, far below what fills a memory


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80  # other: bytes too


def brief(value: object) -> str:
    """Return `value` as Python writes it, shortened in its middle: a file may hold megabytes where a word belongs."""
    return _REPR.repr(value)


def first_few(texts: Sequence[str], count: int = 5) -> str:
    """Return the first `count` of `texts` in one line, and how many more there are."""
    more = [f"and {len(texts) - count} more"] if len(texts) > count else []
    return "; ".join([*texts[:count], *more])


class Faults:
    """What is wrong with the parts of a whole, so that all of it is told at once."""

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
    """Return `path`, whose bytes come to an end.

    Raise ValueError for a pipe, a socket or a device, which would be waited for or read for ever; FileNotFoundError.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: a pipe, a socket or a device, where a file or a folder is expected")
    return path


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The content of the file `path`. Raises ValueError for one of more than `limit` bytes, FileNotFoundError."""
    with regular(path).open("rb") as file:
        content = file.read(limit + 1)  # a size that is asked first may be another by now, and a device has none
    if len(content) > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes, which no such file has")
    return content


def parse_json(text: str) -> Any:
    """What `text` says. Raises ValueError for what is not JSON, nested too deeply, no Unicode, or a key given twice."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that is read here: nested too deeply") from error
    except ValueError as error:  # digits by the thousand, a key given twice
        raise ValueError(f"not JSON that is read here: {error}") from error
    if "\\u" in text and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError("not Unicode: it holds half a surrogate pair")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that it has twice: readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {twice[:40]!r} is given twice")
    return found


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: half a surrogate pair, which JSON and a shell let through, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_inside(folder: Path, name: object, where: object) -> Path:
    """The path of the file `name` of `folder`, where the name stands in data.

    Raises ValueError that begins with `where` for a name that is none, or that leads out of the folder: absolute,
    through `..`, or over a link.
    """
    if not isinstance(name, str) or not name or "\0" in name or not is_unicode(name):
        raise ValueError(f"{where}: expected the name of a file, got {brief(name)}")
    path = folder / name
    if os.path.isabs(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {brief(name)} leads out of {folder}; what is read must lie in it")
    return path
