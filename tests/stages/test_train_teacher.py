"""The loss that a teacher is trained by."""

import pytest
import torch

import tiny
from mlcm_rl import bases
from mlcm_rl.equations.prediction import min_snr_weight
from mlcm_rl.recipe import Teacher, TrainTeacher
from mlcm_rl.stages import train_teacher


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_min_snr_weight_is_that_of_what_the_teacher_predicts(tmp_path, kind):
    base = bases.load(Teacher(path=str(tiny.sd(tmp_path / "sd", kind)), family="sd"), "cpu")
    x0, eps = torch.randn(2, 3, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    t, conditioning = torch.tensor([10, 500, 990]), base.unconditional(3)

    def loss(**changes) -> torch.Tensor:
        stage = TrainTeacher(images="unused", num_steps=1, batch_size=3, **changes)
        return train_teacher.loss(stage, base, base.denoiser, x0, eps, t, conditioning)

    with torch.no_grad():
        weight = loss(min_snr_gamma=5.0) / loss()
    torch.testing.assert_close(weight, min_snr_weight(t, base.schedule, kind, 5.0))
