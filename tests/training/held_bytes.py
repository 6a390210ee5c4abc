"""Measure the bytes of a training student in each process, tensor by tensor, as JSON: one file a process.

held_bytes.py TEACHER FOLDER SETTINGS          (SETTINGS of the distill stage, as JSON)
"""

import json
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import runs
from mlcm_rl.models import students, teachers
from mlcm_rl.training import processes
from mlcm_rl.training.loop import Runtime


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of this process's part of `tensors`."""
    return sum((one.to_local() if hasattr(one, "to_local") else one).nbytes for one in tensors)


def parameters(student: torch.nn.Module) -> list[Tensor]:
    return [getattr(value, "ds_tensor", value) for value in student.parameters()]


class Meter:
    """Bytes of the gradients of a step when they are complete, and of the tensors after its update."""

    def __init__(self, rt: Runtime, student: torch.nn.Module):
        self.rt, self.student, self.bytes = rt, student, {"exchange": 0, "gradients": 0}
        self.zero = getattr(rt.engine, "zero", None)
        if hasattr(self.zero, "setup_buckets"):
            self.set_up, self.zero.setup_buckets = self.zero.setup_buckets, self.buckets
            self.reduce, self.zero.reduce_gradients = self.zero.reduce_gradients, self.reduced
        self.step, rt.engine.step = rt.engine.step, self.before

    def buckets(self) -> None:
        self.set_up()
        self.bytes["exchange"] = self.exchange()

    def reduced(self, **settings: bool) -> None:
        """ZeRO-1 keeps all gradients until the last micro-batch, and its own part of them from here on."""
        self.bytes["gradients"] = self.gradients()
        self.reduce(**settings)

    def gradients(self) -> int:
        own = [value.grad for value in self.student.parameters() if value.grad is not None]
        together = getattr(self.zero, "averaged_gradients", {})
        return max(size(own), size(one for group in together.values() for one in group or []))

    def exchange(self) -> int:
        buffers = [one.buffer for one in self.zero.ipg_buckets.values()]
        return size(part for one in buffers for part in (one if isinstance(one, list) else [one]))

    def before(self, figures: Tensor, should_update: bool) -> tuple[list[float], float]:
        self.bytes["gradients"] = max(self.bytes["gradients"], self.gradients())
        if self.rt.engine.__dict__.get("weights_in_parts"):
            self.bytes["exchange"] = self.exchange()
        return self.step(figures, should_update)

    def after(self) -> dict[str, int]:
        moments = [one for state in self.rt.optimizer.state.values() for one in state.values()]
        whole = [one for one in parameters(self.student) if not hasattr(one, "to_local")]
        originals = {one.untyped_storage().data_ptr() for one in whole}
        flats = self.rt.engine._flats() if self.zero is not None else []
        copies = [one for one in flats if one.untyped_storage().data_ptr() not in originals]
        optimiser = size(moments) + size(copies)
        return self.bytes | {"parameters": size(parameters(self.student)), "optimiser": optimiser}


def main(teacher: Path, folder: Path, settings: dict) -> None:
    stage = runs.distill(**settings)
    recipe = runs.recipe(teacher, folder, [stage])
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    student = students.student(base, stage.adapter, 0)
    base.forget_denoiser()
    whole = [weakref.ref(value.untyped_storage()) for value in student.parameters()]
    optimizer = torch.optim.AdamW(students.trainable_parameters(student), lr=1e-3, fused=True)
    rt.prepare(student, optimizer)
    meter = Meter(rt, student)
    rt.parts, rt.step, rt.update = {}, 0, 0
    own = stage.micro_batch // processes.world_size()
    conditioning = base.encode_prompts(["a cat"] * own)
    x_t, t = torch.zeros(own, *base.latent_shape), torch.full((own,), 500)
    rt.backward(
        base.x0(student, x_t, t, conditioning).square().mean((1, 2, 3)) for _ in range(stage.gradient_accumulation)
    )
    originals = sum(storage.nbytes() for one in whole if (storage := one()) is not None)
    (folder / f"{processes.rank()}.json").write_text(json.dumps(meter.after() | {"originals": originals}))
    processes.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
