"""The ControlNet's stage: from stored samples or pictures, resumed to the same bits, opened by stock diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.equations.edges import edge_map
from mlcm_rl.models import control, teachers
from mlcm_rl.recipe import TrainControl
from mlcm_rl.stages import train_control
from mlcm_rl.training.loop import Runtime


def stage_of(**changes) -> TrainControl:
    settings = {"batch_size": 4, "num_steps": 3, "learning_rate": 1e-3, "log_every": 1, "save_every": 1}
    return TrainControl(**(settings | {"sample_every": 100} | changes))


def train(teacher: Path, folder: Path, *before, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = runs.recipe(teacher, folder, [*before, stage_of(**changes)])
    pipeline.run(recipe)
    return next(Path(recipe.runs, recipe.name).glob("*-train_control"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "control" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return train(tiny_sdxl, folder, runs.trajectories(runs.write_prompts(folder)))


def test_it_learns_and_stock_diffusers_opens_it(whole):
    network = ControlNetModel.from_pretrained(whole / "control")
    assert {value.dtype for value in weights(whole).values()} == {torch.float16}
    assert network.controlnet_mid_block.weight.abs().max() > 0  # it was zero
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert (whole / "samples" / "step-000003.png").is_file()


def test_a_teacher_without_guidance_draws_its_samples_too(tiny_sdxl, tmp_path):
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), stage_of(num_steps=1, sample_every=1)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    teacher = recipe.teacher.model_copy(update={"guidance_scale": 1.0})
    pipeline.run(recipe.model_copy(update={"teacher": teacher}))
    assert next(Path(recipe.runs, recipe.name).glob("*-train_control/samples/step-000001.png")).is_file()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_teacher_in_bfloat16_draws_under_a_network_in_float32(tiny_sdxl, tmp_path, precision):
    stages = [runs.trajectories(runs.write_prompts(tmp_path))]
    stages += [stage_of(num_steps=1, sample_every=1, precision=precision)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    teacher = recipe.teacher.model_copy(update={"dtype": "bfloat16"})
    folder = pipeline.run(recipe.model_copy(update={"teacher": teacher}))[1].folder
    (record,) = runs.records(folder)
    assert record["grad_norm"] > 0
    assert (folder / "samples" / "step-000001.png").is_file()


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(whole, tiny_sdxl, tmp_path, monkeypatch):
    prompts, calls, backward = runs.write_prompts(tmp_path), [], Runtime.backward
    with monkeypatch.context() as patched:

        def interrupted(rt: Runtime, losses):
            calls.append(rt.step)
            if rt.step == 2:
                raise KeyboardInterrupt
            return backward(rt, losses)

        patched.setattr(Runtime, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_sdxl, tmp_path / "cut", runs.trajectories(prompts))
    resumed = train(tiny_sdxl, tmp_path / "cut", runs.trajectories(prompts))
    assert calls == [0, 1, 2]
    expected, result = weights(whole), weights(resumed)
    assert expected.keys() == result.keys()
    assert all(torch.equal(value, result[name]) for name, value in expected.items())


def test_pictures_of_a_folder_give_their_own_edges(tiny_sdxl, tmp_path, monkeypatch):
    images = runs.write_images(tmp_path)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage_of(images=images, gradient_accumulation=2)])
    base = teachers.load(recipe.teacher, torch.device("cpu"))
    drawings = train_control.drawings_of(recipe.stages[0], recipe, base, {})
    latents, edges = drawings.rows(torch.tensor([2]))
    assert latents.shape == (1, *base.latent_shape)
    assert torch.equal(edges, edge_map(torch.zeros(1, 3, 16, 16)).expand(-1, 3, -1, -1))  # of one colour: none
    grids = []
    monkeypatch.setattr(Runtime, "log_picture", lambda rt, step, name, draw: grids.append((step, name, draw().height)))
    pipeline.run(recipe)
    assert grids == [(2, "samples", 2 * (16 + 4) + 4)]  # the trackers have the last step's: edges over drawings


def test_the_loss_is_the_teachers_own_and_reaches_the_control_net_alone(tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage_of(images=runs.write_images(tmp_path))])
    base = teachers.load(recipe.teacher, torch.device("cpu"))
    network, draws = control.new_control_net(base, 0), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, *base.latent_shape, generator=draws)
    t, conditioning = torch.tensor([10, 900]), base.unconditional(2)
    edges = torch.rand(2, 3, 16, 16, generator=draws).round()
    stage = recipe.stages[0]
    loss = train_control.loss(stage, base, network, x0, edges, eps, t, conditioning)
    alpha, sigma = (table[t].reshape(2, 1, 1, 1) for table in (base.schedule.alpha, base.schedule.sigma))
    with torch.no_grad():  # a new ControlNet changes nothing; this teacher predicts the noise
        predicted = base.predict(base.denoiser, alpha * x0 + sigma * eps, t, conditioning)
    torch.testing.assert_close(loss, (predicted - eps).square().mean(dim=(1, 2, 3)))
    weighted = train_control.loss(
        stage.model_copy(update={"min_snr_gamma": 0.05}), base, network, x0, edges, eps, t, conditioning
    )
    snr = (alpha / sigma).flatten() ** 2
    torch.testing.assert_close(weighted, loss * (0.05 / snr).clamp(max=1.0))
    loss.sum().backward()
    assert network.controlnet_mid_block.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in base.denoiser.parameters())


def test_without_pictures_it_needs_trajectories():
    assert stage_of().requirements[0].kinds == ("trajectories",)
    assert stage_of(images="folder").requirements == []
