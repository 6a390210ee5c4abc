"""The looks of a guard, from its stage's log."""

import json
from pathlib import Path


def history(folder: Path) -> list[dict]:
    """Return the looks of a stage's guard, in order, as records of its log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "guard/held_out_gain" in record]
