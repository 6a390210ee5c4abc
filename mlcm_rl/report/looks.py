"""The looks of a guard, as its stage's log has them."""

import json
from pathlib import Path


def history(folder: Path) -> list[dict]:
    """The looks of a finished stage's guard, in order: the records of its log that hold them."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "guard/held_out_gain" in record]
