"""A pair table by a person's choices: two samples of each prompt, and which of them is preferred.

`mlcm pairs --by-hand` between two samples of one student, `mlcm gallery --blind` between two columns of a gallery; the
page is `cli/label_page.py`.
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
from .ranking import PROGRESS_FILE, BlindSettings, PairSettings

SIDES = ("left", "right")
NEITHER = "neither"


def sample_names(number: int) -> list[str]:
    """Return the paths in a table's folder of the two samples of prompt `number`."""
    return [f"pictures/{number:06d}-{index}.png" for index in range(2)]


def num_sampled(prompts: list[Prompt], out: Path) -> int:
    """Return how many of the first `prompts` have both their samples in `out`."""
    missing = (i for i in range(len(prompts)) if not all((out / name).is_file() for name in sample_names(i)))
    return next(missing, len(prompts))


def draw(
    settings: PairSettings, base: Base, student: Student, prompts: list[Prompt], out: Path, batch_size: int
) -> None:
    """Draw the two samples of each of `prompts` that has none in `out` yet, `batch_size` pictures at a time."""
    ranking.sweep(out)
    first_missing, size = num_sampled(prompts, out), max(1, batch_size // settings.num_generations)
    with progress(len(prompts), "samples", first_missing) as bar:
        for first in range(first_missing, len(prompts), size):
            images = ranking.samples(settings, base, student, prompts[first : first + size], first)
            for number, both in enumerate(images, start=first):
                for image, name in zip(both, sample_names(number), strict=True):
                    pictures.save_png(pictures.to_pil(image), out / name)
            bar.advance(len(images))


class Choices:
    """The choices on the pairs of samples in folder `out`, one pair a prompt, judged in the prompts' order.

    Each choice is on disk and in the table before the call returns, and is read from there before the next: the command
    may be killed at any time. Left and right of pair i are shuffled by (seed, i), so that sides carry no information.
    Raises ValueError where `out` holds another table.
    """

    def __init__(self, settings: PairSettings | BlindSettings, prompts: list[Prompt], out: Path):
        self.settings, self.prompts, self.out = settings, prompts, out
        self._save(self.judgements())

    def __len__(self) -> int:
        return len(self.prompts)

    def judgements(self) -> list[int | None]:
        """Return the preferred sample of every pair judged so far, 0 or 1; None for neither."""
        return ranking.progress_of(self.settings, self.out, "choices")

    def counts(self) -> tuple[int, int, int]:
        """Return how often sample 0 was preferred, sample 1, and neither."""
        judgements = self.judgements()
        return judgements.count(0), judgements.count(1), judgements.count(None)

    def choose(self, number: int, side: str) -> None:
        """Prefer the picture on `side` of a pair, or NEITHER. Raises ValueError for any pair but the next."""
        judgements = self.judgements()
        if number != len(judgements) or number >= len(self):
            raise ValueError(f"pair {number} is not the one to be judged now, {len(judgements)} is")
        self._save([*judgements, None if side == NEITHER else self.sample_at(number, side)])

    def undo(self, number: int) -> None:
        """Undo the choice on a pair. Raises ValueError for any pair but the last one judged."""
        judgements = self.judgements()
        if number != len(judgements) - 1:
            raise ValueError(f"pair {number} is not the last one judged, {len(judgements) - 1} is")
        self._save(judgements[:-1])

    def sample_at(self, number: int, side: str) -> int:
        """Return which sample of pair `number`, 0 or 1, is on `side`."""
        return SIDES.index(side) ^ seed_of(self.settings.seed, "sides", number) & 1

    def picture(self, number: int, side: str) -> Path:
        """Return the path of the picture on `side` of pair `number`."""
        return self.out / sample_names(number)[self.sample_at(number, side)]

    def rows(self) -> list[dict]:
        """Return the table: a row for every pair of which one was preferred."""
        rows = []
        for number, (prompt, chosen) in enumerate(zip(self.prompts, self.judgements(), strict=False)):
            if chosen is not None:
                names = sample_names(number)
                row = {"prompt": prompt.prompt, "language": prompt.language}
                rows.append(row | {"chosen": names[chosen], "rejected": names[1 - chosen]})
        return rows

    def _save(self, judgements: list[int | None]) -> None:
        write_json(self.out / PROGRESS_FILE, {"asked": asdict(self.settings), "choices": judgements})
        ranking.write_table(self.rows(), self.out)
