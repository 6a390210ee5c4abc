"""The times that a student is sampled at: a named grid for every number of steps, or its own list for one of them."""

from dataclasses import dataclass

from ..equations.axis import NUM_SEGMENTS, NUM_TIMES
from ..equations.segments import pressed_times, remaining_times, spaced_times
from ..recipe.start import ORIGINAL_STEPS, are_times

MILESTONES = "milestones"


@dataclass(frozen=True)
class SamplingGrid:
    """The grid `name`, or its times; `num_segments` K are the segments whose boundaries the milestones' steps visit."""

    name: str | tuple[int, ...] = MILESTONES
    num_segments: int = 1

    def __str__(self) -> str:
        """Return the grid in words, for labels."""
        return f"{self.name} grid" if isinstance(self.name, str) else f"times {', '.join(map(str, self.name))}"

    def times(self, num_steps: int, strength: float = 1.0) -> list[int]:
        """Return the times of a sampler of `num_steps`, descending, from the share `strength` of the time axis down.

        Below strength 1, milestones are as `remaining_times` says, and the times of other grids that share of theirs.
        Raise ValueError where the grid has none.
        """
        if isinstance(self.name, tuple):
            if num_steps != len(self.name):
                raise ValueError(
                    f"this student is sampled at {', '.join(map(str, self.name))}: in {len(self.name)} steps, and not "
                    f"in {num_steps}"
                )
            return pressed_times(self.name, strength)
        if self.name == MILESTONES:
            return remaining_times(num_steps, strength, self.num_segments)
        return pressed_times(spaced_times(num_steps, ORIGINAL_STEPS[self.name]), strength)

    def has(self, num_steps: int) -> bool:
        """Return whether there are times for a sampler of `num_steps`."""
        return not isinstance(self.name, tuple) or num_steps == len(self.name)

    @property
    def by_steps(self) -> "SamplingGrid":
        """Return the grid that a stock scheduler visits for a number of steps alone: that of one segment."""
        return SamplingGrid(self.name)

    @property
    def original_steps(self) -> int:
        """Return how many evenly spaced times a stock scheduler chooses its steps from; for a list, all of them."""
        return ORIGINAL_STEPS["trailing" if isinstance(self.name, tuple) else self.name]

    @property
    def steps(self) -> list[int]:
        """Return the numbers of steps that it has times for, up to 8."""
        return [n for n in range(1, NUM_SEGMENTS + 1) if self.has(n)]


USUAL = SamplingGrid()


def grid_named(value: object, num_segments: int = 1) -> SamplingGrid:
    """Return the grid that a file or a recipe calls `value`. Raise ValueError for what is none."""
    if isinstance(value, list) and 1 <= len(value) <= NUM_SEGMENTS and are_times(value):
        return SamplingGrid(tuple(value), num_segments)
    if isinstance(value, str) and value in ORIGINAL_STEPS:
        return SamplingGrid(value, num_segments)
    raise ValueError(
        f"grid must be {', '.join(ORIGINAL_STEPS)}, or up to {NUM_SEGMENTS} times, descending, below {NUM_TIMES} and "
        f"above 0; found {value}"
    )
