"""The time axis cut into segments: the grid of stored states, milestones, segment starts, and the sampling grids.

All are integers and exact: `(T - 1) i // n`, never a rounded float. With T = 1000 and 8 segments of 6 steps the grid is
999, 978, 957, ..., 20, 0 and its milestones are 999, 874, 749, 624, 499, 374, 249, 124, 0.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .axis import NUM_SEGMENTS, NUM_TIMES

# The milestone subsets of the authors' released sampler (TLCM inference code), by number of steps.
PAPER_GRIDS = {
    1: (999,),
    2: (999, 499),
    3: (999, 499, 124),
    4: (999, 749, 499, 124),
    5: (999, 749, 499, 249, 124),
    6: (999, 749, 499, 374, 249, 124),
    7: (999, 749, 624, 499, 374, 249, 124),
    8: (999, 874, 749, 624, 499, 374, 249, 124),
}


def time_grid(num_steps: int) -> list[int]:
    """`num_steps` + 1 times from T - 1 down to 0: the grid of a stored trajectory."""
    return [(NUM_TIMES - 1) * (num_steps - i) // num_steps for i in range(num_steps + 1)]


def milestones(num_segments: int) -> Tensor:
    """The K + 1 ends of the K segments, ascending from 0 to T - 1, (K + 1,) int64 (TLCM v6, section 3.2)."""
    return torch.tensor([(NUM_TIMES - 1) * k // num_segments for k in range(num_segments + 1)])


def segment_start(t: Tensor, num_segments: int) -> Tensor:
    """The milestone (B,) where the segment of `t` (B,) starts: t in (t^k, t^(k+1)] belongs to t^k, and 0 to itself."""
    ends = milestones(num_segments).to(t.device)
    return ends[(torch.searchsorted(ends, t) - 1).clamp(min=0)]


def phase_at(step: int, num_steps: list[int]) -> tuple[int, int]:
    """Return the phase of a progressive schedule that `step` falls in, and the step within it.

    `num_steps[i]` is the length of phase i. Raises IndexError past the end.
    """
    for phase, length in enumerate(num_steps):
        if step < length:
            return phase, step
        step -= length
    raise IndexError(f"step is {step} past the end of a schedule of {sum(num_steps)} steps")


def sampling_times(num_steps: int, num_segments: int = 1) -> list[int]:
    """The N times that an N-step sampler visits, from T - 1 down, all of them milestones of 8 segments.

    With one segment they are those of `LCMScheduler(original_inference_steps=8)`: 999, 749, 499, 249 for N = 4. A
    student of K > 1 segments is only right where it ends on its K boundaries. So for N >= K every segment gets N // K
    steps and the noisiest segments one of the rest each; for N < K no grid has all boundaries, and the grid is that of
    one segment.
    Raises ValueError unless 1 <= N <= 8 and K divides 8, or is a multiple of it.
    """
    if not 1 <= num_steps <= NUM_SEGMENTS:
        raise ValueError(f"num_steps is {num_steps}; a sampler on {NUM_SEGMENTS} milestones takes 1 to {NUM_SEGMENTS}")
    if num_segments < 1 or (NUM_SEGMENTS % num_segments and num_segments % NUM_SEGMENTS):
        raise ValueError(
            f"num_segments is {num_segments}, which neither divides {NUM_SEGMENTS} nor is a multiple of it"
        )
    if num_steps < num_segments:
        num_segments = 1
    per_segment = NUM_SEGMENTS // num_segments
    positions = []  # among the milestones of 8 segments, counted from T - 1 down
    for segment in range(num_segments):
        steps = num_steps // num_segments + (segment < num_steps % num_segments)
        positions += [segment * per_segment + i * per_segment // steps for i in range(steps)]
    ends = milestones(NUM_SEGMENTS).flip(0)
    return ends[positions].tolist()


def remaining_times(num_steps: int, strength: float, num_segments: int = 1) -> list[int]:
    """The N times of a sampler that starts at the share `strength` of the time axis, not at T - 1 (SDEdit's t0).

    They are those of `sampling_times`, itself at strength 1, pressed into what remains: every segment into its part
    below the start, so that the boundaries between segments stay where a student of K > 1 segments needs them. Of k
    segments that remain, N >= k have their steps as in `sampling_times`; for N < k the grid is that of one segment.
    499, 374, 249, 124 for N = 4 and strength 0.5.
    Raises as `sampling_times` does, and ValueError for a strength outside (0, 1] or without room for N times.
    """
    sampling_times(num_steps, num_segments)  # raises
    start = Fraction(strength).limit_denominator(NUM_TIMES)
    segments = [(Fraction(k, num_segments), Fraction(k + 1, num_segments)) for k in reversed(range(num_segments))]
    segments = [(end, top) for end, top in segments if end < start]
    if num_steps < len(segments):
        segments = [(Fraction(0), Fraction(1))]
    times = []
    for i, (end, top) in enumerate(segments):
        steps = num_steps // len(segments) + (i < num_steps % len(segments))
        parts = max(int(NUM_SEGMENTS * (top - end)), steps)  # milestones in the segment, or more times where too few
        below = [Fraction(j * parts // steps, parts) for j in range(steps)]
        times += [int((NUM_TIMES - 1) * (end + (min(start, top) - end) * (1 - share))) for share in below]
    _refuse_crowded(times, num_steps, strength)
    return times


def pressed_times(times: Sequence[int], strength: float) -> list[int]:
    """Return the share `strength` of each of the descending `times`: 499, 379, 249, 129 of LCM's at 0.5.

    Raises ValueError for a strength outside (0, 1], and where two times fall on one.
    """
    share = Fraction(strength).limit_denominator(NUM_TIMES)
    pressed = [int(share * t) for t in times]
    _refuse_crowded(pressed, len(times), strength)
    return pressed


def _refuse_crowded(times: Sequence[int], num_steps: int, strength: float) -> None:
    """Raise ValueError for a `strength` outside (0, 1], and where it leaves fewer than `num_steps` times above 0."""
    if not 0 < Fraction(strength).limit_denominator(NUM_TIMES) <= 1 or len({*times, 0}) <= num_steps:
        raise ValueError(f"strength is {strength:g}; it must be at most 1, and large enough for {num_steps} times")


def spaced_times(num_steps: int, num_origins: int) -> list[int]:
    """N of `num_origins` evenly spaced times, from T - 1 down, as diffusers' LCM and TCD schedulers choose them.

    LCM's own 50 give 999, 759, 499, 259 for N = 4 (its `original_inference_steps`); all T give 999, 749, 499, 249, the
    trailing times of DDIM and Euler, from which N = 3, 6 and 7 differ by one at most.
    Raises ValueError unless 1 <= N <= `num_origins` and that divides T.
    """
    if num_origins < 1 or NUM_TIMES % num_origins or not 1 <= num_steps <= num_origins:
        raise ValueError(f"num_steps is {num_steps} of {num_origins} times, which must divide {NUM_TIMES}")
    spacing = NUM_TIMES // num_origins
    return [NUM_TIMES - 1 - spacing * (i * num_origins // num_steps) for i in range(num_steps)]


def draw_steps(num_segments: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start t and end s (B,) of whole segments, from the top of one to its start: each of the K is drawn alike.

    They are the steps of a sampler of K steps, which is all that progressive distillation learns (arXiv 2202.00512).
    """
    ends = milestones(num_segments)
    above = torch.randint(1, num_segments + 1, (size,), generator=generator)
    return ends[above], ends[above - 1]


def draw_jumps(budgets: list[int], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start t and end s (B,) of sampling steps: each draws a number of steps from `budgets`, then one of its steps.

    Both draws are uniform, so that every budget has the same share of a batch, and every step the same share of its
    budget.
    """
    num_steps = torch.tensor(budgets)
    starts = torch.stack([torch.tensor(sampling_times(n) + [0] * (NUM_SEGMENTS + 1 - n)) for n in budgets])
    budget = torch.randint(len(budgets), (size,), generator=generator)
    step = (torch.rand(size, generator=generator) * num_steps[budget]).long()
    return starts[budget, step], starts[budget, step + 1]


def paper_times(num_steps: int) -> list[int]:
    """The authors' own subset of the milestones for N = 1 to 8: 999, 749, 499, 124 for N = 4 (124 is in all from 3 on).

    Raises ValueError for another N.
    """
    if num_steps not in PAPER_GRIDS:
        raise ValueError(f"num_steps is {num_steps}; the paper's grids are given for 1 to 8")
    return list(PAPER_GRIDS[num_steps])
