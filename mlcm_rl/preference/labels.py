"""A pair table by a person's choices: two samples of each prompt, and which of them is preferred.

`mlcm pairs --by-hand`; the page that asks is `label_page.py`.
"""

from dataclasses import asdict
from pathlib import Path

from ..data.prompts import Prompt
from ..models import pictures
from ..models.base import Base
from ..models.students import Student
from ..storage.files import write_json
from ..training.progress import progress
from ..training.seeding import seed_of
from . import ranking
from .ranking import PROGRESS_FILE, Asked

SIDES = ("left", "right")
NEITHER = "neither"


def sample_names(number: int) -> list[str]:
    """Where a folder keeps the two samples of prompt `number`."""
    return [f"pictures/{number:06d}-{index}.png" for index in range(2)]


def num_drawn(prompts: list[Prompt], out: Path) -> int:
    """How many of the first `prompts` have both their samples in `out`."""
    missing = (i for i in range(len(prompts)) if not all((out / name).is_file() for name in sample_names(i)))
    return next(missing, len(prompts))


def draw(asked: Asked, base: Base, student: Student, prompts: list[Prompt], out: Path, batch_size: int) -> None:
    """Draw the two samples of each of `prompts` that has none in `out` yet; `batch_size` pictures at a time."""
    ranking.sweep(out)
    done, size = num_drawn(prompts, out), max(1, batch_size // asked.num_generations)
    with progress(len(prompts), "samples", done) as bar:
        for first in range(done, len(prompts), size):
            images = ranking.samples(asked, base, student, prompts[first : first + size], first)
            for number, both in enumerate(images, start=first):
                for image, name in zip(both, sample_names(number), strict=True):
                    pictures.save_png(pictures.to_pil(image), out / name)
            bar.advance(len(images))


class Choices:
    """The choices on the pairs of samples in folder `out`, one pair a prompt, judged in the prompts' order.

    Each choice is on disk and in the table before the call returns, and is read from there before the next: the command
    may be killed at any time. Left and right of pair i are shuffled by (seed, i), so that a side says nothing.
    Raises ValueError where `out` holds another table.
    """

    def __init__(self, asked: Asked, prompts: list[Prompt], out: Path):
        self.asked, self.prompts, self.out = asked, prompts, out
        self._keep(self.made())

    def __len__(self) -> int:
        return len(self.prompts)

    def made(self) -> list[int | None]:
        """Of every pair judged so far the sample preferred, 0 or 1; None for neither."""
        return ranking.progress_of(self.asked, self.out, "choices")

    def choose(self, number: int, side: str) -> None:
        """Prefer the picture on `side` of a pair, or NEITHER. Raises ValueError for a pair whose turn it is not."""
        made = self.made()
        if number != len(made) or number >= len(self):
            raise ValueError(f"pair {number} is not the one to be judged now, {len(made)} is")
        self._keep([*made, None if side == NEITHER else self.sample_at(number, side)])

    def undo(self, number: int) -> None:
        """Take back the choice on a pair. Raises ValueError for one that is not the last that was judged."""
        made = self.made()
        if number != len(made) - 1:
            raise ValueError(f"pair {number} is not the last one judged, {len(made) - 1} is")
        self._keep(made[:-1])

    def sample_at(self, number: int, side: str) -> int:
        """0 or 1: which sample of pair `number` is shown on `side`."""
        return SIDES.index(side) ^ seed_of(self.asked.seed, "sides", number) & 1

    def picture(self, number: int, side: str) -> Path:
        """The picture on `side` of pair `number`."""
        return self.out / sample_names(number)[self.sample_at(number, side)]

    def rows(self) -> list[dict]:
        """The table: a row for every pair of which one was preferred."""
        rows = []
        for number, (prompt, chosen) in enumerate(zip(self.prompts, self.made(), strict=False)):
            if chosen is not None:
                names = sample_names(number)
                row = {"prompt": prompt.prompt, "language": prompt.language}
                rows.append(row | {"chosen": names[chosen], "rejected": names[1 - chosen]})
        return rows

    def _keep(self, made: list[int | None]) -> None:
        write_json(self.out / PROGRESS_FILE, {"asked": asdict(self.asked), "choices": made})
        ranking.write_table(self.rows(), self.out)
