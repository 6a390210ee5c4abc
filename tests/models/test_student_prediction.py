"""Students that predict x0 where their teacher predicts noise: how their output is read, kept, taken in and tuned."""

import json

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

import runs
import tiny
from mlcm_rl.equations.prediction import X0
from mlcm_rl.models import sampler, student_files, students, terms
from mlcm_rl.models.export import export
from mlcm_rl.preference import tuning
from mlcm_rl.recipe import Full, Lora, StudentSource
from tiny_families import CASES

LORA = Lora(rank=4, alpha=8.0)
TIMES = [999, 749, 499, 249]


def inputs(base):
    noise = base.noise(torch.Generator().manual_seed(3), 2)
    return noise, torch.tensor([999, 374]), base.encode_prompts(["a cat", "红苹果"])


def moved(base, adapter=LORA, prediction=X0):
    denoiser = students.student(base, adapter, 0, prediction_type=prediction)
    tiny.perturb(students.trainable_parameters(denoiser), 1)
    return denoiser


def saved(base, folder, adapter=LORA, prediction=X0):
    """A student of `base` in `folder`, described as a student of the teacher's own prediction would be."""
    students.save_student(moved(base, adapter, prediction), folder, {"num_segments": 1, **students.expected_of(base)})
    return folder


# ---- read ----


def test_its_output_is_x0_and_its_teachers_is_still_noise(base):
    x_t, t, conditioning = inputs(base)
    student = moved(base)
    assert torch.equal(base.x0(student, x_t, t, conditioning), base.predict(student, x_t, t, conditioning))
    prediction = base.predict(base.denoiser, x_t, t, conditioning)
    alpha, sigma = (table[t].view(2, 1, 1, 1) for table in (base.schedule.alpha, base.schedule.sigma))
    x0 = (x_t - sigma * prediction) / alpha if base.prediction_type == "epsilon" else alpha * x_t - sigma * prediction
    torch.testing.assert_close(base.x0(base.denoiser, x_t, t, conditioning), x0)
    assert (base.prediction_of(student), base.prediction_of(base.denoiser)) == (X0, base.prediction_type)
    assert (base.predicts_otherwise(student), base.predicts_otherwise(base.denoiser)) == (True, False)


def test_a_student_of_the_teachers_prediction_is_the_same_network_with_or_without_the_word(base):
    x_t, t, conditioning = inputs(base)
    plain, named = (students.student(base, LORA, 0, prediction_type=one) for one in (None, base.prediction_type))
    expected = base.x0(base.denoiser, x_t, t, conditioning)
    assert all(torch.equal(base.x0(one, x_t, t, conditioning), expected) for one in (plain, named))
    assert plain.state_dict().keys() == named.state_dict().keys()


def test_an_error_at_the_noisiest_time_reaches_x0_as_it_is_and_not_divided_by_alpha(sdxl):
    """At 999 alpha is 0.0682: the same error of the output is 14.6 times as large in x0 where noise is predicted."""
    error, t = torch.full((1, *sdxl.latent_shape), 0.01), torch.tensor([999])
    noise = sdxl.noise(torch.Generator().manual_seed(3), 1)

    class Says(torch.nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output, self.weight = output, torch.nn.Parameter(torch.zeros(1))

        def forward(self, *arguments, **conditions):
            return (self.output,)

    def x0_of(output, prediction):
        says = Says(output)
        students._set_prediction(sdxl, says, prediction)
        return sdxl.x0(says, noise, t, sdxl.unconditional(1))

    for prediction, factor in ((X0, 1.0), ("epsilon", -(0.995343**0.5) / 0.004657**0.5)):
        apart = x0_of(error, prediction) - x0_of(0 * error, prediction)
        torch.testing.assert_close(apart, factor * error, atol=1e-5, rtol=2e-3)


def test_deterministic_steps_are_ddim_by_hand_from_x0_to_noise_and_back(base):
    """x0 = 0.3 x: eps = (x - alpha 0.3 x) / sigma, and the next state is alpha x0 + sigma eps of the next time."""

    class Third(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x_t, t, **conditions):
            return (self.gain * x_t,)

    denoiser, noise = Third(), base.noise(torch.Generator().manual_seed(0), 2)
    students._set_prediction(base, denoiser, X0)
    found = sampler.sample(base, denoiser, base.unconditional(2), noise, TIMES, gamma=0.0)
    x, alpha, sigma = noise.double(), base.schedule.alpha.double(), base.schedule.sigma.double()
    for t, s in zip(TIMES, [*TIMES[1:], 0], strict=True):
        x0 = 0.3 * x
        eps = (x - alpha[t] * x0) / sigma[t]
        x = alpha[s] * x0 + sigma[s] * eps
    torch.testing.assert_close(found.double(), x0, atol=1e-5, rtol=1e-5)


def test_the_fake_score_of_its_samples_predicts_as_the_teacher(sdxl):
    stage = runs.distill(num_segments=[1], prediction="x0", matching={"fake": {"rank": 2, "alpha": 2.0}})
    (matching,) = terms.terms_of(stage, sdxl, 0, None)
    assert sdxl.prediction_of(matching.network) == "epsilon"


# ---- kept ----


@pytest.mark.parametrize("adapter", [LORA, Full()], ids=["lora", "full"])
def test_a_saved_student_says_what_it_predicts_and_is_read_back_so(sdxl, adapter, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    folder = saved(sdxl, tmp_path / "student", adapter)
    assert students.describe(folder)["prediction_type"] == X0
    loaded = students.load_student(sdxl, folder)
    expected = sdxl.predict(moved(sdxl, adapter), x_t, t, conditioning)
    assert torch.equal(sdxl.x0(loaded.denoiser, x_t, t, conditioning), expected)
    if isinstance(adapter, Full):
        assert "own_prediction" not in json.loads((folder / "unet" / "config.json").read_text())


def test_a_student_goes_on_to_x0_and_never_back(sdxl, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    folder = saved(sdxl, tmp_path / "noise", prediction=None)
    assert students.describe(folder)["prediction_type"] == "epsilon"
    turned = students.student(sdxl, LORA, 0, start=folder, prediction_type=X0)
    assert torch.equal(
        sdxl.x0(turned, x_t, t, conditioning), sdxl.predict(moved(sdxl), x_t, t, conditioning)
    )  # the same network, read otherwise
    students.save_student(turned, tmp_path / "x0", {"num_segments": 1, **students.expected_of(sdxl)})
    for asked in (None, X0):
        again = students.student(sdxl, LORA, 0, start=tmp_path / "x0", prediction_type=asked)
        assert sdxl.prediction_of(again) == X0
    with pytest.raises(ValueError, match=r"predicts x0, and the stage would go on with epsilon: .*prediction: x0"):
        students.student(sdxl, LORA, 0, start=tmp_path / "x0", prediction_type="epsilon")


def test_no_family_of_flows_has_such_students_and_no_teacher_those_of_another_type(sdxl, tmp_path):
    flow = CASES["sd3"].load(CASES["sd3"].write(tmp_path / "sd3"))
    with pytest.raises(ValueError, match=r"cannot predict sample: of family sd3 it predicts flow$"):
        students.student(flow, LORA, 0, prediction_type=X0)
    with pytest.raises(ValueError, match=r"cannot predict v_prediction: of family sdxl it predicts epsilon or sample"):
        students.student(sdxl, LORA, 0, prediction_type="v_prediction")
    folder = saved(sdxl, tmp_path / "student")
    described = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(described | {"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="the student's prediction_type is v_prediction, the teacher's epsilon"):
        students.load_student(sdxl, folder)


# ---- tuned ----


def test_tuning_its_reference_and_the_student_after_it_read_x0(sdxl, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    folder = saved(sdxl, tmp_path / "student")
    denoiser = students.for_preference(sdxl, Lora(rank=2, alpha=4.0), 0, folder)
    student = tuning.TunableStudent(sdxl, denoiser, TIMES, 0.0, False, 1, students.grid_of(students.describe(folder)))
    expected = sdxl.predict(moved(sdxl), x_t, t, conditioning)
    torch.testing.assert_close(student.x0(x_t, t, torch.zeros_like(t), conditioning), expected, atol=1e-5, rtol=1e-5)
    tiny.perturb(students.trainable_parameters(denoiser), 2)
    reference = student.reference_x0(x_t, t, torch.zeros_like(t), conditioning)
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=1e-5)
    own = student.x0(x_t, t, torch.zeros_like(t), conditioning)
    assert torch.equal(own, sdxl.predict(denoiser, x_t, t, conditioning))
    assert not torch.allclose(own, expected, atol=1e-3)
    students.save_tuned(denoiser, folder, tmp_path / "tuned", 3)
    tuned = students.load_student(sdxl, tmp_path / "tuned").denoiser
    assert torch.equal(sdxl.x0(tuned, x_t, t, conditioning), own)
    student_files.write_untuned(
        tmp_path / "tuned", tmp_path / "again", student_files.untuned_description(tmp_path / "tuned")
    )
    again = students.load_student(sdxl, tmp_path / "again").denoiser
    torch.testing.assert_close(sdxl.x0(again, x_t, t, conditioning), own, atol=1e-5, rtol=1e-5)


# ---- taken in ----


def taken_in(base, out, path, **stated):
    student_files.take_in(base, StudentSource(path=str(path), **stated), out)
    return students.load_student(base, out)


@pytest.mark.parametrize("adapter", [LORA, Full()], ids=["lora", "full"])
def test_a_student_and_its_export_are_taken_in_as_what_they_say_they_are(sdxl, adapter, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    folder = saved(sdxl, tmp_path / "student", adapter)
    expected = sdxl.x0(students.load_student(sdxl, folder).denoiser, x_t, t, conditioning)
    for name, path in (("own", folder), ("export", export(folder, sdxl, tmp_path / "out"))):
        student = taken_in(sdxl, tmp_path / "taken" / name, path)
        torch.testing.assert_close(sdxl.x0(student.denoiser, x_t, t, conditioning), expected, atol=1e-5, rtol=1e-5)


def test_a_published_one_says_it_by_its_scheduler_or_is_named_so(sdxl, teachers, tmp_path):
    """As the one-step SDXL-Lightning: a file of a UNet's weights that states nothing."""
    theirs = moved(sdxl, Full())
    save_file(theirs.state_dict(), tmp_path / "unet.safetensors")
    as_published = {"gamma": 0.0, "grid": "trailing"}
    named = taken_in(sdxl, tmp_path / "named", tmp_path / "unet.safetensors", prediction="x0", **as_published)
    unnamed = taken_in(sdxl, tmp_path / "unnamed", tmp_path / "unet.safetensors", **as_published)
    assert [sdxl.prediction_of(one.denoiser) for one in (named, unnamed)] == [X0, "epsilon"]
    stock = StableDiffusionXLPipeline.from_pretrained(teachers["sdxl"])
    stock.unet.load_state_dict(theirs.state_dict())
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, prediction_type="sample")
    stock.save_pretrained(tmp_path / "pipeline")
    assert sdxl.prediction_of(taken_in(sdxl, tmp_path / "taken", tmp_path / "pipeline").denoiser) == X0
    flow = CASES["sd3"].load(CASES["sd3"].write(tmp_path / "sd3"))
    with pytest.raises(ValueError, match=r"prediction: x0, the teacher .* predicts flow: its student predicts flow"):
        taken_in(flow, tmp_path / "none", tmp_path / "unet.safetensors", prediction="x0", **as_published)
