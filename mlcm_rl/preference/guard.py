"""The guard against reward hacking: early stopping by held-out rewards on fixed prompts and noise.

A gain is (mean score - the reference's mean) / the reference's standard deviation over the watched prompts: rewards of
all scales then have one unit, and 0 is the student as it was distilled.

The watched samples are drawn in micro-batches like a step's, each process its share of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..equations import consistency, constraints
from ..equations.statistics import deviation, mean_and_error, wins
from ..models import students
from ..models.teachers import tell_truncated
from ..recipe import Reward, Tuning
from ..report import plots
from ..report.guard_history import history
from ..rewards import Combined, combine
from ..storage.files import CheckpointError, read_json, write_json
from ..training import processes
from ..training.loop import Runtime
from ..training.progress import tell
from ..training.seeding import generator
from . import tuning


@dataclass
class Verdict:
    """The state of the guard between looks, which a checkpoint holds as JSON."""

    kept_step: int = 0  # steps of the best student; 0 is the distilled one
    held_out: float = 0.0  # its held-out gain
    trained: float = 0.0  # its gain in the rewards trained on
    looks_without_gain: int = 0
    warnings: list[str] = field(default_factory=list)


class HackingGuard:
    """Measures a student under preference learning every so many steps and keeps the best one by held-out reward."""

    def __init__(
        self,
        rt: Runtime,
        stage: Tuning,
        student: tuning.TunableStudent,
        weights: dict[str, Tensor],
        rewards: Combined,
    ):
        self.rt, self.stage, self.student, self.weights = rt, stage, student, weights
        self.rewards = {"trained": rewards, "held_out": combine(stage.guard.rewards, student.base.device, False)}
        prompts = tuning.watched_prompts(stage)
        for one in self.rewards.values():
            one.refuse_unread(prompt.language for prompt in prompts)
        tell_truncated(student.base, [prompt.prompt for prompt in prompts], stage.guard_prompts or stage.prompts)
        self.num_watched = len(prompts)
        self.batches = [
            tuning.start(
                student.base,
                [prompts[i] for i in part],
                [generator(rt.recipe.seed, stage.kind, "guard", i) for i in part],
            )
            for part in processes.equal_parts(len(prompts), stage.micro_batch)
        ]
        self.noise_states = [[one.get_state() for one in batch.generators] for batch in self.batches]
        with students.as_reference(student.denoiser):
            self.reference_latents, self.reference_scores = self._samples()
        self.verdict = Verdict(warnings=self._unmeasured())
        self.best = {name: value.detach().clone() for name, value in weights.items()}

    @property
    def stopped(self) -> bool:
        """Whether `patience` looks have passed without a better held-out reward."""
        return self.verdict.looks_without_gain >= self.stage.guard.patience

    def look(self, steps: int) -> dict[str, float]:
        """Measure the student after `steps` steps and return the record for the log.

        The student is kept where its held-out gain is the best so far. A warning says where that has fallen while the
        gain in the rewards trained on has risen: they are being hacked.
        """
        latents, scores = self._samples()
        distances = consistency.squared_l2(latents, self.reference_latents).to(self.student.base.device)
        record = {"guard/distance": self._whole(distances).mean().item()}
        for name, values in scores.items():
            record[f"guard/reward/{name}"] = values.mean().item()
            record[f"guard/win_rate/{name}"] = wins(values, self.reference_scores[name]).mean().item()
        drops = {name: self._drop(name, scores) for name in self.stage.max_drops}
        gains = self._gain(self.stage.objectives, scores), self._gain(self.stage.guard.rewards, scores)
        # equal on all processes but for a device's last bits
        (trained, held_out), drops = processes.broadcast((gains, drops))
        broken = [name for name, (drop, _) in drops.items() if drop > self.stage.max_drops[name]]
        self._judge(steps, trained, held_out, broken)
        for name, (drop, error) in drops.items():
            record |= {f"guard/drop/{name}": drop, f"guard/drop_error/{name}": error}
        return record | {"guard/trained_gain": trained, "guard/held_out_gain": held_out}

    def curves(self, folder: Path) -> Image.Image:
        """Return the gains of all looks so far as a picture, from the log in `folder`."""
        return plots.guard_picture(history(folder), self.verdict.kept_step)

    def finish(self, folder: Path) -> None:
        """Write to guard.json which student is kept (its weights are `best`) and whether the guard stopped the run."""
        write_json(folder / "guard.json", {"stopped": self.stopped, **self.state()})

    def state(self) -> dict:
        """Return the state for a checkpoint."""
        return asdict(self.verdict)

    def load_state(self, state: dict) -> None:
        """Restore a `state`. Raises CheckpointError for the state of another version."""
        if state.keys() != asdict(Verdict()).keys():
            raise CheckpointError(
                f"the checkpoint's guard remembers {', '.join(state) or 'nothing'}: delete checkpoints/"
            )
        self.verdict = Verdict(**state)

    def _judge(self, steps: int, trained: float, held_out: float, broken: Sequence[str]) -> None:
        """Keep the student of `steps` steps where it is the best so far, else count the look and warn of hacking.

        One that is the best and in which constraints are `broken` is not kept, and the look does not count: their
        multipliers grow until they are met.
        """
        record = self.verdict
        if held_out > record.held_out and broken:
            return
        if held_out > record.held_out:
            record.kept_step, record.held_out, record.trained, record.looks_without_gain = (
                steps,
                held_out,
                trained,
                0,
            )
            for name, value in self.weights.items():
                self.best[name].copy_(value.detach())
            return
        record.looks_without_gain += 1
        if trained > record.trained and held_out < record.held_out:
            looks = f"{record.looks_without_gain} of {self.stage.guard.patience} looks"
            ending = f"stopped, step {record.kept_step} kept" if self.stopped else f"{looks} before the run is stopped"
            warning = (
                f"step {steps}: the trained reward rose by {trained - record.trained:.3g} and the held-out one fell by "
                f"{record.held_out - held_out:.3g} (deviations of the reference) since step {record.kept_step}: "
                f"{ending}"
            )
            record.warnings.append(warning)
            tell("guard", warning, "yellow")

    def _unmeasured(self) -> list[str]:
        """Print and return a warning for each reward without a deviation, which `_gain` leaves out.

        Raises ValueError where no held-out reward is left.
        """
        all_zero = [name for name, scores in self.reference_scores.items() if not deviation(scores)]
        if not {reward.name for reward in self.stage.guard.rewards} - set(all_zero):
            raise ValueError(
                f"guard.rewards: {', '.join(all_zero)} gives every watched sample of the distilled student 0, so that "
                "no gain can be measured: name a reward that tells them apart, or other guard_prompts"
            )
        warnings = [
            f"{name} gives every watched sample of the distilled student 0: its gain cannot be measured and is left out"
            for name in all_zero
        ]
        for warning in warnings:
            tell("guard", warning, "yellow")
        return warnings

    def _gain(self, rewards: Sequence[Reward], scores: dict[str, Tensor]) -> float:
        """Return the weighted sum of the gains of `rewards`."""
        total = 0.0
        for reward in rewards:
            reference = self.reference_scores[reward.name]
            if unit := deviation(reference):
                total += reward.weight * (scores[reward.name].mean() - reference.mean()).item() / unit
        return total

    def _drop(self, name: str, scores: dict[str, Tensor]) -> tuple[float, float]:
        """Return how far the constrained reward `name` is below the reference's, in its deviations, and the error."""
        reference = self.reference_scores[name]
        return mean_and_error(constraints.drop(scores[name], reference, deviation(reference)))

    def _whole(self, part: Tensor) -> Tensor:
        """Gather the values (P,) of all watched prompts on the CPU, from each process's own on its device."""
        return processes.gather(part)[: self.num_watched].cpu()

    @torch.no_grad()
    def _samples(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this process's samples (p, C, H, W) of the watched prompts, and all scores (P,) by reward."""
        latents: list[Tensor] = []
        scores: dict[str, list[Tensor]] = {}
        for batch, states in zip(self.batches, self.noise_states, strict=True):
            for one, state in zip(batch.generators, states, strict=True):
                one.set_state(state)
            with self.rt.autocast():
                x0 = self.student.sample(batch)
            images = self.student.base.autoencoder.decode(x0)
            latents.append(x0.cpu())
            for rewards in self.rewards.values():
                for name, values in rewards.raw(images, batch.prompts, batch.languages).items():
                    scores.setdefault(name, []).append(values)
        return torch.cat(latents), {name: self._whole(torch.cat(values)) for name, values in scores.items()}


def ending(folder: Path) -> str:
    """Return in words which student the guard of a finished stage kept, and whether it stopped the run."""
    record = read_json(folder / "guard.json", kept_step=int, stopped=bool)
    num_steps = read_json(folder / "manifest.json", stage=dict)["stage"]["num_steps"]
    stopped = ", and stopped the run" if record["stopped"] else ""
    if record["kept_step"]:
        return f"kept step {record['kept_step']} of {num_steps}{stopped}"
    return (
        f"kept step 0 of {num_steps}{stopped}: by the held-out reward no look was better, so that this is the student "
        "as it was distilled"
    )
