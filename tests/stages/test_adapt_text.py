"""The loop that gives a teacher another text encoder: exact resumption, what it leaves, and what it then serves."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import runs
import text_adapters
import tiny
from mlcm_rl import pipeline
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.models import teachers
from mlcm_rl.models.base import Base
from mlcm_rl.pipeline import finished_runs, results
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.recipe import Evaluate, Recipe, Samples, Teacher
from mlcm_rl.stages import adapt_text
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training.loop import Runtime


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_adapter" / "text_adapter.safetensors")


def adapt(teacher: Path, folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    return pipeline.run(text_adapters.recipe(teacher, folder, **changes))[1].folder


def later_stages(folder: Path) -> list:
    prompts = runs.write_prompts(folder)
    student = {"num_segments": [1], "num_steps": 1, "adapter": {"kind": "lora", "rank": 2}}
    table = {"num_prompts": 6, "sampling_steps": [1], "gammas": [0.0], "teacher_steps": [2]}
    return [runs.distill(**student), Evaluate(prompts=prompts, **table)]


@pytest.fixture(scope="module")
def finished(tiny_sdxl, tmp_path_factory) -> tuple[Recipe, list[Path]]:
    """A recipe with a student and a table before the adapter, the same table after it, and the stages' folders."""
    folder = tmp_path_factory.mktemp("adapted")
    recipe = text_adapters.recipe(tiny_sdxl, folder, num_steps=2, sample_every=2, features=3.0, outputs=0.5)
    store, stage = recipe.stages
    student, table = later_stages(folder)
    recipe = recipe.model_copy(update={"stages": [store, student, table, stage, table]})
    return recipe, [place.folder for place in pipeline.run(recipe)]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tiny_sdxl, tmp_path, monkeypatch):
    whole = adapt(tiny_sdxl, tmp_path / "whole")
    with monkeypatch.context() as patched:
        backward = Runtime.backward

        def interrupted(rt: Runtime, losses):
            if rt.step == 2:
                raise SystemExit
            return backward(rt, losses)

        patched.setattr(Runtime, "backward", interrupted)
        with pytest.raises(SystemExit):
            adapt(tiny_sdxl, tmp_path / "cut")
    for link in (tmp_path / "cut" / "runs").glob("*/0*"):
        link.unlink()
    assert all(one.is_needed for one in results.stages(tmp_path / "cut" / "runs"))  # it goes on from the store
    resumed = adapt(tiny_sdxl, tmp_path / "cut")
    expected, result = weights(whole), weights(resumed)
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)
    assert records(whole) == records(resumed)


@pytest.mark.slow
def test_micro_batches_make_the_same_step(tiny_sdxl, tmp_path):
    settings = {"num_steps": 1, "learning_rate": 1e-3}
    one = adapt(tiny_sdxl, tmp_path / "one", **settings)
    split = adapt(tiny_sdxl, tmp_path / "split", gradient_accumulation=2, gradient_checkpointing=True, **settings)
    for record in ("loss", "grad_norm"):
        assert records(split)[0][record] == pytest.approx(records(one)[0][record], rel=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_terms(finished):
    (record,) = [record for record in records(finished[1][3]) if "held_out_loss" in record]
    total = 3.0 * record["held_out_features"] + 0.5 * record["held_out_outputs"]
    assert record["held_out_loss"] == pytest.approx(total)


def test_at_first_the_features_are_their_mean_and_the_teacher_stays_as_it_is(tiny_sdxl, tmp_path):
    """The error of the mean is 1 over the prompts that it is of; the adapter alone is trained."""
    before = hash_of(tiny_sdxl)
    recipe = text_adapters.recipe(tiny_sdxl, tmp_path, num_steps=1)
    (stored,) = pipeline.run(recipe.model_copy(update={"stages": recipe.stages[:1]}))
    stage, base = recipe.stages[1], teachers.load(recipe.teacher, "cpu")
    store = adapt_text.open_store(stage, recipe, base, stored.folder)
    texts = adapt_text.texts_of(stage)
    data = adapt_text.Data(base, store, adapt_text.encode(stage, recipe, base, texts), texts)
    adapter = adapt_text.new_adapter(stage, data, seed=0)
    index = torch.arange(store.prompts.count)
    batch = data.noised(index, torch.Generator().manual_seed(0))
    terms = adapt_text.terms(stage, base, adapter, data, batch)
    assert terms["features"].mean().item() == pytest.approx(1.0, rel=1e-4)
    adapt_text.loss(stage, terms).sum().backward()
    assert all(value.grad is None for value in base.denoiser.parameters())
    assert adapter.to_context.weight.grad.abs().max() > 0
    assert adapter.to_pooled.weight.grad.abs().max() > 0
    assert hash_of(tiny_sdxl) == before


def hash_of(teacher: Path) -> str:
    return teachers.teacher_hash(Teacher(path=str(teacher), family="sdxl"))


def test_the_denoiser_is_not_asked_where_its_outputs_do_not_count(tiny_sdxl, tmp_path, monkeypatch):
    recipe = text_adapters.recipe(tiny_sdxl, tmp_path, outputs=0.0)
    recipe = recipe.model_copy(update={"samples": Samples()})
    pipeline.run(recipe.model_copy(update={"stages": recipe.stages[:1]}))
    monkeypatch.setattr(Base, "predict", None)
    pipeline.run(recipe)
    assert network_evaluations(recipe.stages[1], recipe) == 0


def test_the_plan_is_what_is_evaluated_and_trained(tiny_sdxl, tmp_path, monkeypatch):
    recipe = text_adapters.recipe(tiny_sdxl, tmp_path).model_copy(update={"samples": Samples()})
    recipe.stages[1] = recipe.stages[1].model_copy(update={"held_out_every": 100})
    pipeline.run(recipe.model_copy(update={"stages": recipe.stages[:1]}))
    monkeypatch.setattr(adapt_text, "held_out", lambda *_: {})  # losses on held-out samples are not counted
    base = type(teachers.load(recipe.teacher, "cpu"))
    predict, samples = base.predict, []

    def counted(self, denoiser, x_t, *rest):
        samples.append(0 if x_t.is_meta else len(x_t))  # none of the prediction of memory
        return predict(self, denoiser, x_t, *rest)

    monkeypatch.setattr(base, "predict", counted)
    folder = pipeline.run(recipe)[1].folder
    assert sum(samples) == network_evaluations(recipe.stages[1], recipe) == 3 * 3 * 4
    networks, sizes = recipe.stages[1].networks(None), Sizes(recipe)
    made = {name: value for name, value in weights(folder).items() if not name.endswith(("_mean", "_deviation"))}
    assert sizes.trained(networks) == sum(value.numel() for value in made.values())
    memory = sizes.memory(recipe.stages[1], "cpu")
    assert memory.gradients == 4 * sizes.trained(networks)
    assert memory.optimiser == 8 * sizes.trained(networks)
    work = {one.kind: one for one in sizes.work(recipe.stages[1])}
    assert work["trained"].count == 12
    assert work["student"].count == 24
    assert work["trained"].each.total > 2 * work["student"].each.total


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_other_families_are_adapted(tmp_path, family):
    teacher = getattr(tiny, family)(tmp_path / family)
    folder = adapt(teacher, tmp_path / "run", family=family, num_steps=2)
    described = Teacher(path=str(teacher), family=family, text_adapter=str(folder / "text_adapter"))
    base = teachers.load(described, "cpu")
    own, made = base.encode_prompts(["a cat"]), base.encode_prompts(["熊猫"])
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in made.items()}


# ---- what it serves ----


def test_the_teacher_serves_both_languages_and_its_own_as_before(tiny_sdxl, finished):
    place = finished[1][3]
    teacher = Teacher(path=str(tiny_sdxl), family="sdxl")
    plain = teachers.load(teacher, "cpu")
    base = teachers.load(teacher.model_copy(update={"text_adapter": str(place / "text_adapter")}), "cpu")
    own, adapted = plain.encode_prompts(["a cat", "熊猫"]), base.encode_prompts(["a cat", "熊猫"])
    english = plain.encode_prompts(["a cat"])
    for name, value in adapted.items():
        assert value.shape == own[name].shape
        assert torch.equal(value[0], english[name][0])
        assert not torch.allclose(value[1], own[name][1])
    assert base.count_tokens(["a cat", "熊猫" * 20]) == [plain.count_tokens(["a cat"])[0], 42]
    for one, other in zip(plain.unconditional(1).values(), base.unconditional(1).values(), strict=True):
        assert torch.equal(one, other)
    base.encode_ahead(["熊猫"])
    assert base.adapted is None
    torch.testing.assert_close(base.encode_prompts(["熊猫"])["context"][0], adapted["context"][1])


def test_the_same_student_is_measured_before_and_after(finished):
    _, places = finished
    before, after = (json.loads((places[i] / "report.json").read_text()) for i in (2, 4))
    assert [row["id"] for row in before["rows"]] == [row["id"] for row in after["rows"]]
    assert before["teacher"]["text_adapter"] is None
    assert after["teacher"]["text_adapter"] == "text_adapter"
    manifests = [json.loads((places[i] / "manifest.json").read_text()) for i in (2, 4)]
    assert ["adapt_text" in manifest["parents"] for manifest in manifests] == [False, True]
    assert manifests[0]["parents"]["distill"] == manifests[1]["parents"]["distill"]


def test_the_samples_of_the_grid_are_drawn_in_both_languages(finished):
    assert len(list((finished[1][3] / "samples").glob("*.png"))) == 1


def test_pictures_are_drawn_through_an_adapter_by_a_student_from_before(finished, tmp_path):
    _, places = finished
    prompts, adapter = ["熊猫", "a cat"], places[3] / "text_adapter"
    pixels = []
    for number, folder in enumerate((None, adapter)):
        out = tmp_path / str(number)
        *files, _grid = finished_runs.sample(places[1], prompts, [1], 0, None, out, text_adapter=folder)
        pixels.append([Image.open(file).tobytes() for file in files])
    (chinese, english), (adapted, same) = pixels
    assert chinese != adapted
    assert english == same


def test_a_store_of_other_prompts_is_refused(tiny_sdxl, tmp_path):
    recipe = text_adapters.recipe(tiny_sdxl, tmp_path)
    (stored,) = pipeline.run(recipe.model_copy(update={"stages": recipe.stages[:1]}))
    path = Path(recipe.stages[1].prompts)
    path.write_text(path.read_text(encoding="utf-8").replace("a cat", "a dog"), encoding="utf-8")
    base = teachers.load(recipe.teacher, "cpu")
    with pytest.raises(CheckpointError, match="does not belong to this run: prompts_hash"):
        adapt_text.open_store(recipe.stages[1], recipe, base, stored.folder)


def test_lines_without_a_parallel_prompt_are_reported_before_anything_runs(tiny_sdxl, tmp_path):
    recipe = text_adapters.recipe(tiny_sdxl, tmp_path)
    path = Path(recipe.stages[1].prompts)
    path.write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "parallel": "un chien"}\n', encoding="utf-8")
    with pytest.raises(pipeline.RunError) as raised:
        pipeline.run(recipe)
    assert "parallel.jsonl:1: no parallel: write the same prompt in zh under that key" in str(raised.value)
    assert "parallel.jsonl:2: parallel is a prompt without East Asian characters" in str(raised.value)
    assert not (tmp_path / "runs" / "stages").exists()


def test_an_encoder_that_cannot_be_loaded_is_reported_before_anything_runs(tiny_sdxl, tmp_path):
    recipe = text_adapters.recipe(tiny_sdxl, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(recipe.stages[1].encoder) / name).unlink()
    with pytest.raises(pipeline.RunError, match=r"stages\[1\] \(adapt_text\): encoder: .* has no words"):
        pipeline.run(recipe)
    assert not (tmp_path / "runs" / "stages").exists()
