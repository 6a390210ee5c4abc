"""Pack the folder of a pair table, as `mlcm pairs` writes it, into one Parquet file with the pictures inside.

python recipes/emoji/build/pack_pairs.py pairs recipes/emoji/taste.parquet
"""

import argparse
from pathlib import Path

from datasets import Dataset, Image

from mlcm_rl.data.pairs import COLUMNS, PairTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    packed(arguments.folder).to_parquet(arguments.out)


def packed(folder: Path) -> Dataset:
    """The pairs in `folder` with the bytes of their pictures, in columns prompt, language, chosen, rejected."""
    table = PairTable(folder)
    columns: dict[str, list] = {
        "prompt": [prompt.prompt for prompt in table.prompts],
        "language": [prompt.language for prompt in table.prompts],
    }
    for name in COLUMNS[1:]:
        columns[name] = [{"bytes": (folder / row[name]["path"]).read_bytes(), "path": None} for row in table.rows]
    rows = Dataset.from_dict(columns)
    for name in COLUMNS[1:]:
        rows = rows.cast_column(name, Image())
    return rows


if __name__ == "__main__":
    main()
