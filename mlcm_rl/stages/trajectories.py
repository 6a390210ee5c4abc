"""Stage `trajectories`: the teacher's guided DDIM trajectories from noise to data, every state kept."""

from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import read_prompts
from ..data.trajectory_store import Provenance, Writer
from ..equations.segments import NUM_SEGMENTS, milestones, time_grid
from ..equations.solver import ddim_step
from ..models import teachers
from ..models.base import Base, Conditioning
from ..models.teachers import teacher_hash
from ..recipe import Recipe, Trajectories
from ..storage import finite
from ..storage.hashing import sha256
from ..training import processes, progress, seeding
from ..training.devices import device_of


def run(stage: Trajectories, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Write the store of `num_trajectories` + `num_held_out` trajectories to `folder`, resuming what is there.

    Trajectory i takes prompt i (the prompts are gone round when there are more trajectories) and noise that is a
    function of (seed, i) alone. States are those of any other batch size but for their last bits.
    """
    device = device_of(recipe.device)
    base = teachers.load(recipe.teacher, device)
    prompts = [prompt.prompt for prompt in read_prompts(stage.prompts)]
    teachers.tell_truncated(base, prompts, stage.prompts)
    writer = Writer(folder, provenance(stage, recipe, base), stage.shard_size, stage.batch_size)
    missing = writer.missing()
    writer.require_room(missing, base.latent_shape)
    done = writer.total - sum(map(len, missing))
    if done:
        progress.tell("trajectories", f"goes on after {done} that were saved")
    with progress.progress(writer.total, "trajectories", done) as bar:
        for first in range(0, len(missing), processes.world_size()):
            shards = missing[first : first + processes.world_size()]  # one for each process, then all are recorded
            for shard in processes.share(shards):
                parts = []
                for start in range(shard.start, shard.stop, stage.batch_size):
                    batch = range(start, min(start + stage.batch_size, shard.stop))
                    texts = [prompts[i % len(prompts)] for i in batch]
                    conditioning = base.encode_prompts(texts)
                    finite.refuse_encoded(conditioning, texts, base.dtype)
                    noise = base.noise([seeding.generator(recipe.seed, "trajectories", i) for i in batch], len(batch))
                    states, x0 = solve(base, conditioning, noise, writer.provenance.grid, recipe.teacher.guidance_scale)
                    refuse_nonfinite(states, x0, texts, writer.provenance.grid, base.dtype)
                    parts.append({"states": states, "x0": x0, **conditioning})
                    bar.advance(len(batch))
                whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
                writer.write(shard, whole.pop("states"), whole.pop("x0"), whole)
            bar.advance(sum(map(len, shards[1:])))  # those of the other processes
            writer.record_shards()


def solve(
    base: Base, conditioning: Conditioning, noise: Tensor, grid: list[int], guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Guided DDIM from `noise` (B, C, H, W) down `grid`: all states (B, len(grid), C, H, W), and the last step's x0."""
    unconditional = base.unconditional(len(noise))
    states = [noise]
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
    """What the store of `stage` must say of itself. Raises ValueError where a milestone is not on the grid."""
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
    )
