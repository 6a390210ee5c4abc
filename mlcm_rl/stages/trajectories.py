"""Stage `trajectories`: the teacher's guided DDIM trajectories from noise to data, and what prompts became."""

from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import read_prompts
from ..data.store_writer import Writer
from ..data.trajectory_store import Provenance
from ..equations.axis import NUM_SEGMENTS
from ..equations.segments import milestones, time_grid
from ..equations.solver import ddim_step
from ..models import teachers
from ..models.base import Base
from ..models.conditioning import Conditioning, concatenated, on_device
from ..models.teachers import teacher_hash
from ..recipe import Recipe, Trajectories
from ..storage import finite
from ..storage.hashing import sha256
from ..training import progress, seeding
from ..training.devices import device_of


def run(stage: Trajectories, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Write the store of `num_trajectories` + `num_held_out` trajectories to `folder`, after the shards that are there.

    Trajectory i has prompt i, modulo their number, and noise that is a function of (seed, i) alone. States depend on
    the batch size in their last bits alone.
    """
    device = device_of(recipe.device)
    base = teachers.load(recipe.teacher, device)
    prompts = [prompt.prompt for prompt in read_prompts(stage.prompts)]
    teachers.tell_truncated(base, prompts, stage.prompts)
    writer = Writer(folder, provenance(stage, recipe, base), len(prompts), stage.shard_size, stage.batch_size)
    writer.require_room(base.latent_shape)
    encode(stage, base, prompts, writer)

    # Every process reads what all of them have encoded, and no text encoder is needed any more.
    writer.gather("prompts")
    base.encode_ahead([])
    encoded = writer.encoded()
    grid, guidance_scale = writer.provenance.grid, recipe.teacher.guidance_scale
    stored = torch.tensor([grid.index(time) for time in writer.provenance.stored_times])
    num_saved = writer.provenance.total - sum(map(len, writer.missing("shards")))
    if num_saved:
        progress.tell("trajectories", f"goes on after {num_saved} that were saved")
    with progress.progress(writer.provenance.total, "trajectories", num_saved) as bar:
        for shard in writer.claimed("shards"):
            parts = []
            for start in range(shard.start, shard.stop, stage.batch_size):
                batch = range(start, min(start + stage.batch_size, shard.stop))
                texts = [prompts[i % len(prompts)] for i in batch]
                conditioning = on_device(encoded.conditioning(torch.tensor(batch)), device)
                noise = base.noise([seeding.generator(recipe.seed, "trajectories", i) for i in batch], len(batch))
                states, x0 = solve(base, conditioning, noise, grid, guidance_scale)
                refuse_nonfinite(states, x0, texts, grid, base.dtype)
                parts.append((states.cpu()[:, stored], x0.cpu()))
                bar.advance(len(batch))
            writer.write(shard, torch.cat([states for states, _ in parts]), torch.cat([x0 for _, x0 in parts]))
            bar.advance(max(0, writer.num_written() - bar.num_finished))  # those of the other processes
        writer.finish()
        bar.advance(writer.provenance.total - bar.num_finished)


def encode(stage: Trajectories, base: Base, prompts: list[str], writer: Writer) -> None:
    """Write what the prompts become, each once, whichever of several processes comes to it first."""
    for rows in writer.claimed("prompts"):
        parts = []
        for start in range(rows.start, rows.stop, stage.batch_size):
            texts = prompts[start : min(start + stage.batch_size, rows.stop)]
            conditioning = base.encode_prompts(texts)
            finite.refuse_encoded(conditioning, texts, base.dtype)
            parts.append(on_device(conditioning, torch.device("cpu")))
        writer.write_prompts(rows, concatenated(parts), base.dtype)


def solve(
    base: Base, conditioning: Conditioning, noise: Tensor, grid: list[int], guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the states (B, len(grid), C, H, W) of guided DDIM from `noise` down `grid`, and the last step's x0."""
    unconditional = base.unconditional(len(noise))
    states = [noise]
    with base.same_prompts(base.denoiser):
        for start, end in zip(grid, grid[1:], strict=False):
            t, s = (torch.full((len(noise),), time, device=noise.device) for time in (start, end))
            x0 = base.guided_x0(states[-1], t, conditioning, unconditional, guidance_scale)
            states.append(ddim_step(states[-1], x0, t, s, base.schedule))
    return torch.stack(states, dim=1), x0


def refuse_nonfinite(states: Tensor, x0: Tensor, texts: list[str], grid: list[int], dtype: torch.dtype) -> None:
    """Raise ValueError for the first step of the solver that left NaN or infinity in `states` (B, len(grid), C, H, W).

    `x0` (B, C, H, W) is of the last step, `texts` (B) are the prompts, `dtype` is the teacher's.
    """
    if finite.is_finite(states) and finite.is_finite(x0):
        return
    step = finite.first_bad_row(states.transpose(0, 1))
    place = finite.first_bad_row(x0 if step is None else states[:, step])
    assert place is not None  # one of them is not finite
    step = len(grid) - 1 if step is None else step
    raise ValueError(
        f"prompt {texts[place]!r}: step {step} of {len(grid) - 1} of the solver, from t = {grid[step - 1]} to "
        f"{grid[step]}, leaves a state that is not finite in {str(dtype).removeprefix('torch.')}; "
        f"{finite.way_out(dtype)}"
    )


def provenance(stage: Trajectories, recipe: Recipe, base: Base) -> Provenance:
    """Return the description of the store of `stage`. Raises ValueError where a milestone is not on the grid."""
    grid = time_grid(stage.solver_steps)
    off = set(milestones(NUM_SEGMENTS).tolist()) - set(grid)
    if off:
        raise ValueError(f"milestones {sorted(off)} are not on the grid of {stage.solver_steps} steps")
    return Provenance(
        teacher_hash=teacher_hash(recipe.teacher),
        scheduler=base.schedule_record(),
        prediction_type=base.prediction_type,
        solver="ddim",
        grid=grid,
        guidance_scale=recipe.teacher.guidance_scale,
        prompts_hash=sha256(Path(stage.prompts)),
        num_trajectories=stage.num_trajectories,
        num_held_out=stage.num_held_out,
        seed=recipe.seed,
        dtype=stage.dtype,
        maths=stage.maths,
        times=grid if stage.keeps(recipe) == "all" else milestones(NUM_SEGMENTS).flip(0).tolist(),
    )
