"""Ways to spoil a good file: values of a JSON object exchanged, bytes flipped, inserted, cut off."""

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NAMES = ["../x", "/etc/passwd", "..", ".", "", "a\0b", "\ud800", "x" * 5000, "C:\\x", "link", "~"]
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf")]

scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS + NAMES) | st.text(max_size=5)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)
exchanges = st.lists(st.tuples(st.integers(0, 10_000), values | st.just("DROP")), min_size=1, max_size=3)
damages = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "cut", "zero"]), st.integers(0, 2**20), st.integers(1, 255)),
    min_size=1,
    max_size=4,
)


def exchanged(value: Any, changes: list[tuple[int, Any]]) -> Any:
    """`value`, of JSON, with what stands at some of its places replaced or dropped."""
    for place, new in changes:
        places = list(_places(value))
        if not places:
            return new
        holder, key = places[place % len(places)]
        if new == "DROP":
            del holder[key]
        else:
            holder[key] = new
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(items):
        yield value, key
        yield from _places(one)


def damaged(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """`data` after some `damages`; the first bytes, where formats keep their lengths, are hit most often."""
    for how, place, byte in changes:
        at = place % (len(data) + 1) if place % 2 else place % (min(len(data), 64) + 1)
        if how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + bytes([byte]) * (byte % 9 + 1) + data[at:]
        elif how == "zero":
            data = data[:at] + bytes(8) + data[at + 8 :]
        else:
            data = data[:at] + bytes(one ^ byte for one in data[at : at + 1]) + data[at + 1 :]
    return data
