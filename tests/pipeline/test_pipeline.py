"""Recipes end to end on tiny teachers, and what makes a stage run again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from typer.testing import CliRunner

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.cli.app import app
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.models import students, teachers
from mlcm_rl.pipeline import BadArgument, RunError, finished_runs, running, sample_inputs
from mlcm_rl.pipeline.fingerprint import identity, settings
from mlcm_rl.recipe import Distill, Dpo, Evaluate, Full, Lora
from mlcm_rl.recipe.file import load
from mlcm_rl.storage import checkpoints
from mlcm_rl.storage.manifest import finish
from mlcm_rl.training.loop import Runtime

SHIPPED = sorted(Path("recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def finished(tiny_sdxl, tmp_path_factory):
    """A whole run, its memory predicted and measured: recipe and stages."""
    recipe = runs.whole(
        tiny_sdxl, tmp_path_factory.mktemp("whole"), num_segments=[8, 1], held_out_every=1, sample_every=1
    )
    return recipe, pipeline.run(recipe)


def test_a_run_leaves_a_student_snapshots_pictures_a_log_and_a_report(finished):
    recipe, (store, student, report) = finished
    assert (student.folder / "student" / "student.json").is_file()
    assert len(list((student.folder / "snapshots").iterdir())) == 2
    assert len(list((student.folder / "samples").glob("*.png"))) == 4
    assert (report.folder / "report.html").is_file()
    assert json.loads((report.folder / "manifest.json").read_text())["parents"]["distill"] == student.folder.name
    links = sorted(Path(recipe.runs, recipe.name).iterdir())
    assert [link.name for link in links] == ["00-trajectories", "01-distill", "02-evaluate"]
    assert links[0].resolve() == store.folder.resolve()
    assert not (student.folder / "checkpoints").exists()


def test_a_training_stage_says_what_memory_was_predicted_and_what_was_measured(finished):
    _, (store, student, _) = finished
    memory = json.loads((student.folder / "manifest.json").read_text())["memory"]
    assert memory["predicted"]["gradients"] > 0
    assert memory["measured"] is None or memory["measured"] >= 0
    assert json.loads((store.folder / "manifest.json").read_text())["memory"] is None


def test_links_lead_to_nothing_of_an_earlier_version_of_the_recipe(tiny_sdxl, tmp_path, monkeypatch):
    stopped_at = []

    def run_stage(stage, recipe, done, result, skip_damaged):
        if stage.kind in stopped_at:
            raise ValueError("stopped")
        result.folder.mkdir(parents=True)
        finish(result.folder, {"kind": stage.kind, "fingerprint": result.fingerprint})

    monkeypatch.setattr(running, "run_stage", run_stage)
    recipe = runs.whole(tiny_sdxl, tmp_path, num_segments=[1])
    links = Path(recipe.runs, recipe.name)
    pipeline.run(recipe)
    stopped_at.append("evaluate")
    changed = change(recipe, 1, learning_rate=2e-3)
    with pytest.raises(RunError, match="stopped"):
        pipeline.run(changed)
    assert sorted(link.name for link in links.iterdir()) == ["00-trajectories", "01-distill"]
    with pytest.raises(RunError, match="holds no finished evaluate"):
        finished_runs.find_stage(links, ("evaluate",))
    pipeline.run(recipe)  # all of it is there
    assert len(list(links.iterdir())) == 3
    (links / "02-evaluate" / "manifest.json").unlink()
    with pytest.raises(RunError, match="02-evaluate leads to a stage that is gone or unfinished"):
        finished_runs.find_stage(links, ("distill", "evaluate"))
    assert finished_runs.find_stage(links, ("distill",)).name.startswith("distill-")
    done = pipeline.run(recipe.model_copy(update={"stages": recipe.stages[:2]}))
    assert [link.resolve() for link in sorted(links.iterdir())] == [stage.folder.resolve() for stage in done]


def test_a_second_run_does_nothing(finished, capsys):
    recipe, stages = finished
    before = {stage.folder: (stage.folder / "manifest.json").stat().st_mtime_ns for stage in stages}
    assert pipeline.run(recipe) == stages
    assert {folder: (folder / "manifest.json").stat().st_mtime_ns for folder in before} == before


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_told_before_any_stage_and_can_be_planned_for(
    tiny_sdxl, tmp_path, monkeypatch, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    stages = [runs.trajectories(runs.write_prompts(tmp_path))]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages, device=device)
    with pytest.raises(RunError, match=f"^device: {device} is not available here: write device: auto or cpu$"):
        pipeline.run(recipe)
    assert not Path(recipe.runs).exists()
    with pytest.raises(RunError, match=f"plan: device: {device} is not available here"):
        pipeline.device_here(recipe)
    assert [stage.kind for stage in pipeline.plan(recipe)] == ["trajectories"]


def test_memory_that_does_not_suffice_names_the_stage_and_the_ways_out_and_loses_nothing(
    tiny_sdxl, tmp_path, monkeypatch
):
    path = tmp_path / "small.yaml"
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), runs.distill(num_segments=[1], num_steps=3)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    path.write_text(recipe.model_dump_json())
    original, calls = Runtime.backward, []

    def backward(self, losses):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, losses)

    monkeypatch.setattr(Runtime, "backward", backward)
    failed = CliRunner().invoke(app, ["run", str(path)])
    assert (failed.exit_code, type(failed.exception)) == (1, SystemExit)
    assert "stages[1] (distill): memory of the device does not suffice: smaller micro-batches" in failed.stderr
    (folder,) = Path(recipe.runs).glob("stages/distill-*")
    assert checkpoints.checkpoints(folder)[-1].name.endswith("2")
    assert CliRunner().invoke(app, ["run", str(path)]).exit_code == 0
    assert len(calls) == 4  # the step that failed, and no other again


def change(recipe, number, **changes):
    stages = list(recipe.stages)
    stages[number] = stages[number].model_copy(update=changes)
    return recipe.model_copy(update={"stages": stages})


def fingerprints(recipe) -> list[str]:
    return [stage.fingerprint for stage in pipeline.plan(recipe)]


def test_a_change_reruns_its_stage_and_those_after_it_and_nothing_before(finished):
    recipe, _ = finished
    before = fingerprints(recipe)
    for number, changes in ((0, {"num_held_out": 1}), (1, {"learning_rate": 2e-3}), (2, {"num_prompts": 3})):
        after = fingerprints(change(recipe, number, **changes))
        assert after[:number] == before[:number]
        assert all(a != b for a, b in zip(after[number:], before[number:], strict=True))


def test_what_cannot_change_a_result_is_not_hashed(finished):
    recipe, _ = finished
    before = fingerprints(recipe)
    assert fingerprints(change(recipe, 1, log_every=7, save_every=9, sample_every=11)) == before
    assert fingerprints(change(recipe, 0, batch_size=1, shard_size=1)) == before
    assert fingerprints(recipe.model_copy(update={"name": "another", "trackers": ["tensorboard"]})) == before
    assert "log_every" not in settings(recipe.stages[1])
    assert "learning_rate" in settings(recipe.stages[1])


def test_a_setting_at_its_default_is_not_hashed_so_that_new_ones_do_not_orphan_finished_stages(finished):
    recipe, _ = finished
    assert "skip" not in settings(recipe.stages[1])
    assert settings(recipe.stages[1].model_copy(update={"skip": 7}))["skip"] == 7
    kinds = [settings(recipe.stages[1].model_copy(update={"adapter": one})) for one in (Lora(), Full(), Lora(rank=2))]
    assert kinds[0] != kinds[1] != kinds[2]


def test_a_correction_moves_the_folders_of_the_stages_that_it_changes_and_no_others():
    averaged = {"target": "consistency", "target_ema": 0.9}
    noised = {"source": "data", "images": "unused"}
    assert runs.distill(**averaged, precision="bf16").corrections == 1
    assert runs.distill(**averaged).corrections == 0
    assert runs.distill(num_segments=[1], adversarial={}).corrections == 1
    assert runs.distill(num_segments=[1], adversarial={"jumps": "all"}).corrections == 0
    assert runs.distill(target="consistency", precision="bf16").corrections == 0
    assert runs.distill(target="consistency", source="online", prompts="unused").corrections == 1
    assert runs.distill(target="consistency", **noised).corrections == 2
    assert runs.distill(**averaged, **noised, precision="bf16").corrections == 3
    assert runs.distill(method="inter_segment", num_segments=[1]).corrections == 0


def test_stages_that_read_pictures_are_run_again_since_all_are_read_alike(tiny_sdxl, tmp_path):
    dpo = runs.tuning("dpo", runs.write_prompts(tmp_path))
    pairs = dpo.model_copy(update={"pairs": runs.write_pairs(tmp_path / "pairs")})
    recipe = runs.recipe(tiny_sdxl, tmp_path, [dpo, pairs])
    assert [identity(stage, recipe, {})["maths"] for stage in recipe.stages] == [Dpo.maths, Dpo.maths + 1]


def test_a_stage_of_its_own_seed_leaves_the_others_where_they_are(finished):
    recipe, _ = finished
    before = fingerprints(recipe)
    assert fingerprints(change(recipe, 0, seed=recipe.seed)) == before
    after = fingerprints(change(recipe, 1, seed=recipe.seed + 1))
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[2] != before[2]
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    assert fingerprints(change(other, 0, seed=recipe.seed))[0] == before[0]


def test_a_stages_own_seed_draws_what_the_recipes_would(tiny_sdxl, tmp_path):
    def drawn(name: str, seed: int, own: int | None) -> torch.Tensor:
        folder = tmp_path / name
        folder.mkdir()
        stage = runs.trajectories(runs.write_prompts(folder), seed=own)
        recipe = runs.recipe(tiny_sdxl, folder, [stage]).model_copy(update={"seed": seed})
        return Store(pipeline.run(recipe)[0].folder).x0(torch.arange(6))

    own, whole, other = drawn("own", 0, 5), drawn("whole", 5, None), drawn("other", 0, None)
    assert torch.equal(own, whole)
    assert not torch.equal(own, other)


def test_seed_guidance_prompts_and_weights_are_hashed(finished, tmp_path):
    recipe, _ = finished
    before = fingerprints(recipe)
    assert fingerprints(recipe.model_copy(update={"seed": 5}))[0] != before[0]
    guided = recipe.teacher.model_copy(update={"guidance_scale": 5.0})
    assert fingerprints(recipe.model_copy(update={"teacher": guided}))[0] != before[0]
    other = recipe.teacher.model_copy(update={"path": str(tiny.sdxl(tmp_path / "other", seed=1))})
    assert fingerprints(recipe.model_copy(update={"teacher": other}))[0] != before[0]
    same = recipe.teacher.model_copy(update={"path": str(shutil.copytree(recipe.teacher.path, tmp_path / "same"))})
    assert fingerprints(recipe.model_copy(update={"teacher": same})) == before
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("another prompt\n")
    assert fingerprints(change(recipe, 0, prompts=str(prompts)))[0] != before[0]


def test_tiles_and_every_weight_of_a_small_decoder_are_hashed(finished, tmp_path):
    recipe, _ = finished
    prompts = recipe.stages[0].prompts

    def tuned(**changes) -> str:
        stages = [*recipe.stages, runs.tuning("feedback", prompts, **changes)]
        return fingerprints(recipe.model_copy(update={"stages": stages}))[-1]

    one, same, other = (tiny.small_decoder(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    plain, tiled, first = tuned(), tuned(autoencoder_tiles=8), tuned(small_decoder=one)
    assert len({plain, tiled, first, tuned(small_decoder=other)}) == 4
    assert tuned(small_decoder=same) == first
    with pytest.raises(RunError, match=r"config\.json"):
        tuned(small_decoder=str(tmp_path))


def test_distillation_that_reads_no_trajectories_does_not_depend_on_them(finished):
    recipe, _ = finished
    prompts = recipe.stages[0].prompts
    online = change(recipe, 1, source="online", prompts=prompts, target="consistency")
    assert fingerprints(online)[1] == fingerprints(change(online, 0, num_held_out=1))[1]


def test_plan_counts_the_evaluations_that_a_run_takes(finished):
    """By hand: samples times passes."""
    recipe, (store, *_) = finished
    stages = pipeline.plan(recipe)
    assert [stage.done for stage in stages] == [True, True, True]
    assert stages[0].network_evaluations == 8 * 8 * 2
    assert stages[1].network_evaluations == 4 * 4  # trajectory targets: the student's own pass alone
    written = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert stages[0].disk_bytes == pytest.approx(written, rel=0.3)
    assert len(list(Store(store.folder).held_out)) == 2


def test_each_source_costs_what_its_docstring_says(finished):
    recipe, _ = finished
    prompts = recipe.stages[0].prompts
    for settings_, passes in (
        ({"target": "consistency"}, 2),
        ({"source": "online", "prompts": prompts, "target": "consistency"}, 2 + 11),
        ({"source": "data", "images": "x", "target": "consistency"}, 2 + 2),
        ({"method": "inter_segment", "num_segments": [1]}, 2 + 6),
        ({"method": "inter_segment", "num_segments": [1], "renoise": "student", "prompts": prompts}, 2 + 6 + 4),
    ):
        stage = runs.distill(**({"num_segments": [1]} | settings_))
        assert network_evaluations(stage, recipe) == stage.num_steps * stage.batch_size * passes


def test_sample_is_the_same_picture_whatever_else_is_asked_for(finished, tmp_path):
    recipe, _ = finished
    run = Path(recipe.runs, recipe.name)
    one = finished_runs.sample(run, ["a cat"], [2], 7, None, tmp_path / "one")
    two = finished_runs.sample(run, ["a cat", "熊猫"], [2], 7, None, tmp_path / "two")
    assert len(two) == 3  # and the sheet
    assert one[0].read_bytes() == two[0].read_bytes()


def test_sample_draws_in_batches_the_same_pictures(finished, tmp_path, monkeypatch):
    recipe, _ = finished
    run, prompts = Path(recipe.runs, recipe.name), ["a cat", "熊猫", "a dog", "a red car", "a cat"]
    sizes = []
    original = finished_runs._sample
    monkeypatch.setattr(finished_runs, "_sample", lambda *given: sizes.append(len(given[2])) or original(*given))
    found = {size: finished_runs.sample(run, prompts, [2], 7, None, tmp_path / str(size), size) for size in (1, 2, 5)}
    assert sizes == [1, 1, 1, 1, 1, 2, 2, 1, 5]
    for size in (1, 2):
        for one, other in zip(found[size], found[5], strict=True):  # the sheets too
            assert one.name == other.name
            assert ImageChops.difference(Image.open(one), Image.open(other)).getextrema() == ((0, 0),) * 3


def test_a_second_prompt_goes_beside_the_first_and_a_picture_says_what_it_is(finished, tmp_path):
    recipe, stages = finished
    run = Path(recipe.runs, recipe.name)
    (first,) = finished_runs.sample(run, ["a cat"], [2], 7, None, tmp_path)
    before = first.read_bytes()
    *more, _ = finished_runs.sample(run, ["熊猫", "a dog"], [2], 7, 0.5, tmp_path)
    assert [path.name[:3] for path in [first, *more]] == ["000", "001", "002"]
    assert first.read_bytes() == before
    assert Image.open(more[0]).text == {
        "prompt": "熊猫", "number": "0", "seed": "7", "steps": "2", "gamma": "0.5", "student": stages[1].folder.name
    }  # fmt: skip


def test_several_pictures_are_on_a_sheet_with_a_row_a_noise_and_a_column_a_number_of_steps(finished, tmp_path):
    recipe, _ = finished
    run = Path(recipe.runs, recipe.name)
    *files, sheet = finished_runs.sample(run, ["a cat", "熊猫"], [1, 2], 7, None, tmp_path, images_per_prompt=2)
    assert [path.name for path in files[:5]] == [*(f"00{i}-seed7-steps1.png" for i in range(4)), "000-seed7-steps2.png"]
    whole, (width, height) = Image.open(sheet), Image.open(files[0]).size
    row = (whole.height - 17) // 4  # 17 pixels of labels over the columns, and as many over each row
    assert (whole.width, row) == (320, 17 + height + 4)
    assert whole.text["prompts"].splitlines() == ["a cat", "a cat", "熊猫", "熊猫"]
    for number in range(4):
        for column in (0, 1):
            left, top = 4 + column * (width + 4), 2 * 17 + number * row
            part = whole.crop((left, top, left + width, top + height))
            assert ImageChops.difference(part, Image.open(files[4 * column + number])).getbbox() is None
    assert files[0].read_bytes() != files[1].read_bytes()  # of one prompt, from two noises


def test_two_at_once_draw_into_one_folder_under_numbers_of_their_own(tmp_path):
    with finished_runs._numbers(tmp_path, 2) as first, finished_runs._numbers(tmp_path, 3) as second:
        assert (first, second) == (0, 2)
        (tmp_path / "004-seed0-steps4.png").touch()
        with finished_runs._numbers(tmp_path, 1) as third:
            assert third == 5
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["004-seed0-steps4.png"]


def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(finished, tmp_path, monkeypatch):
    recipe, _ = finished
    run = Path(recipe.runs, recipe.name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(teachers, "load", lambda *_: pytest.fail("loaded"))
    for command in (
        lambda: finished_runs.sample(run, ["a cat"], [2], 0, None, tmp_path, device="cuda"),
        lambda: finished_runs.evaluate(run, device="cuda"),
    ):
        with pytest.raises(BadArgument, match="--device: device: cuda is not available here"):
            command()


def test_steps_that_a_student_is_not_for_are_told(tiny_sdxl, tmp_path, capsys):
    stages = [runs.trajectories(runs.write_prompts(tmp_path), solver_steps=48)]
    stages.append(Distill(batch_size=4, num_steps=1))
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    pipeline.run(recipe)
    run = Path(recipe.runs, recipe.name)
    capsys.readouterr()
    finished_runs.sample(run, ["a cat"], [4], 0, None, tmp_path / "four")
    assert "--steps" not in capsys.readouterr().out
    finished_runs.sample(run, ["a cat"], [1], 0, None, tmp_path / "one")
    assert "--steps 1: this student learned to draw in 2, 3, 4, 6, 8 steps alone" in capsys.readouterr().out


def test_evaluate_and_export_of_a_finished_run(finished, tmp_path):
    recipe, stages = finished
    run = Path(recipe.runs, recipe.name)
    folder = finished_runs.evaluate(run, num_prompts=3, num_steps=[1])
    report = json.loads((folder / "report.json").read_text())
    assert {row["num_steps"] for row in report["rows"] if row["role"] == "student"} == {1}
    out = finished_runs.export(run, tmp_path / "out")
    for again in (
        lambda: finished_runs.export(out, tmp_path / "again"),
        lambda: finished_runs.evaluate(out),
        lambda: finished_runs.sample(out, ["red"], [4], 0, None, tmp_path / "pictures"),
    ):
        with pytest.raises(RunError, match=r"out is a model for diffusers.*README\.md has the code"):
            again()
    assert (out / "model_index.json").is_file()
    card = (out / "README.md").read_text()
    assert "## Measured\n\n" in card
    assert "\nlanguage:\n- en\n" in card
    assert finished_runs.find_stage(stages[1].folder, ("distill",)) == stages[1].folder.resolve()
    with pytest.raises(RunError, match="holds no finished evaluate"):
        finished_runs.find_stage(stages[1].folder, ("evaluate",))


@pytest.mark.slow
def test_a_run_without_an_evaluate_stage_is_evaluated_on_a_file(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill(num_steps=1)])
    pipeline.run(recipe)
    run = Path(recipe.runs, recipe.name)
    with pytest.raises(RunError, match="no evaluate stage to take prompts from: name --prompts FILE"):
        finished_runs.evaluate(run)
    few = tmp_path / "few.txt"
    few.write_text("a cat\na dog\n")
    report = json.loads((finished_runs.evaluate(run, num_steps=[1], prompts=few) / "report.json").read_text())
    assert [one["prompt"] for one in report["prompts"]] == ["a cat", "a dog"]


def test_arguments_that_cannot_be_are_told_before_the_teacher_is_loaded(finished, tmp_path, monkeypatch):
    recipe, _ = finished
    run, empty = Path(recipe.runs, recipe.name), tmp_path / "empty.txt"
    empty.touch()
    monkeypatch.setattr(teachers, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(BadArgument, match=r"OUT: .* is there already; name a new folder"):
        finished_runs.export(run, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadArgument, match=r"OUT: .*link is there already"):
        finished_runs.export(run, tmp_path / "link")
    (tmp_path / "link").unlink()
    with pytest.raises(BadArgument, match=r"--push: 'mine' has no owner: write NAME/mine"):
        finished_runs.export(run, tmp_path / "out", repository="mine")
    with pytest.raises(BadArgument, match=r"--num-prompts: .* holds \d+ prompts, num_prompts is 999"):
        finished_runs.evaluate(run, num_prompts=999)
    with pytest.raises(BadArgument, match=r"--prompts: .*empty\.txt: holds no prompts"):
        finished_runs.pairs(run, empty, "colourfulness", tmp_path / "out", None, 2, 2, 0.0, 0, 4)
    with pytest.raises(BadArgument, match=r"--prompts: .*empty\.txt: holds no prompts"):
        finished_runs.pairs_by_hand(run, empty, tmp_path / "out", None, 2, 0, 4, lambda choices: None)
    assert list(tmp_path.iterdir()) == [empty]


def test_a_student_is_not_used_over_a_teacher_that_has_changed(finished, tmp_path):
    recipe, _ = finished
    run, file = Path(recipe.runs, recipe.name), next(Path(recipe.teacher.path, "vae").glob("*.safetensors"))
    made_with = file.read_bytes()
    file.write_bytes(made_with[:-1] + bytes([made_with[-1] ^ 1]))
    try:
        with pytest.raises(RunError, match=r"sample: teacher .* has changed since distill-\w+ was made with it"):
            finished_runs.sample(run, ["a cat"], [2], 7, None, tmp_path / "drawn")
        with pytest.raises(RunError, match=r"export: teacher .* has changed"):
            finished_runs.export(run, tmp_path / "exported")
    finally:
        file.write_bytes(made_with)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_teacher_is_one_sentence(finished, tmp_path):
    recipe, _ = finished
    gone = recipe.teacher.model_copy(update={"path": str(tmp_path / "gone")})
    with pytest.raises(RunError, match="gone"):
        pipeline.run(recipe.model_copy(update={"teacher": gone}))


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        pytest.param("sdxl_mlcm_paper", "epsilon", marks=pytest.mark.slow),
        pytest.param("sd15_mlcm_paper", "epsilon", marks=pytest.mark.slow),
        pytest.param("sd15_mlcm_paper", "v_prediction", marks=pytest.mark.slow),  # as SD 2.1
    ],
)
def test_the_papers_recipes_run_end_to_end_on_a_tiny_checkpoint(name, prediction_type, tmp_path):
    """As shipped, float16 beside bfloat16 too, but for what size forces: the teacher, counts and batch sizes."""
    family = "sdxl" if name.startswith("sdxl") else "sd"
    teacher = getattr(tiny, family)(tmp_path / "teacher", prediction_type)
    small = [
        f"teacher.path={teacher}",
        f"runs={tmp_path / 'runs'}",
        "device=cpu",
        "samples.prompts=[a cat]",
        "stages.0.num_trajectories=4",
        "stages.0.num_held_out=2",
        "stages.0.solver_steps=8",
        "stages.1.num_steps=[1, 1, 1, 1]",
        "stages.1.log_every=1",
        "stages.1.batch_size=4",
        "stages.1.gradient_accumulation=2",
        "stages.2.num_steps=1",
        "stages.2.log_every=1",
        "stages.2.batch_size=2",
        "stages.2.gradient_accumulation=1",
        "stages.3.num_prompts=2",
        "stages.3.teacher_steps=[2]",
    ]
    recipe = load(Path("recipes") / f"{name}.yaml", small)
    stages = pipeline.run(recipe)
    assert [stage.kind for stage in stages] == ["trajectories", "distill", "distill", "evaluate"]
    assert (stages[-1].folder / "report.html").is_file()
    assert all(stage.done for stage in pipeline.plan(recipe))
    assert Store(stages[0].folder).provenance.prediction_type == prediction_type
    assert students.describe(stages[2].folder / "student")["prediction_type"] == prediction_type
    curves = json.loads((stages[-1].folder / "report.json").read_text())["curves"]
    of_first = [(1, phase, num_segments) for phase, num_segments in enumerate((8, 4, 2, 1))]
    assert [(one["stage"], one["phase"], one["num_segments"]) for one in curves] == [*of_first, (2, 0, 1)]


@pytest.mark.slow
def test_logcds_recipe_runs_end_to_end_on_a_tiny_checkpoint(tmp_path):
    """As shipped, in bfloat16 and recomputed, but for what size forces; both terms are in its second stage's log."""
    small = [
        f"teacher.path={tiny.sdxl(tmp_path / 'teacher')}",
        f"runs={tmp_path / 'runs'}",
        "device=cpu",
        "samples.prompts=[]",
        "stages.0.num_trajectories=4",
        "stages.0.num_held_out=2",
        "stages.0.solver_steps=8",
        *(f"stages.{i}.{setting}" for i in (1, 2) for setting in ("num_steps=1", "log_every=1", "batch_size=2")),
        *(f"stages.{i}.gradient_accumulation=2" for i in (1, 2)),
        "stages.3.num_prompts=2",
        "stages.3.sampling_steps=[2]",
        "stages.3.teacher_steps=[2]",
    ]
    stages = pipeline.run(load(Path("recipes") / "sdxl_logcd.yaml", small))
    assert all(stage.done for stage in pipeline.plan(load(Path("recipes") / "sdxl_logcd.yaml", small)))
    (record,) = runs.records(stages[2].folder)
    assert {"distance", "matching", "adversarial", "fake_loss", "heads_loss"} < record.keys()
    assert students.describe(stages[2].folder / "student")["num_segments"] == 1


@pytest.mark.parametrize("name", ["sdxl_mlcm", pytest.param("sd15_mlcm", marks=pytest.mark.slow)])
def test_the_recommended_recipes_run_end_to_end_on_a_tiny_checkpoint(name, tmp_path):
    """As shipped but for what size forces, and of the form that a bare `distill` has."""
    teacher = getattr(tiny, "sdxl" if name.startswith("sdxl") else "sd")(tmp_path / "teacher")
    small = [
        *(f"teacher.path={teacher}", f"runs={tmp_path / 'runs'}", "device=cpu", "samples.prompts=[a cat]"),
        *(
            "stages.0.num_trajectories=4",
            "stages.0.num_held_out=2",
            "stages.0.solver_steps=48",
            "stages.0.batch_size=4",
        ),
        *("stages.1.num_steps=1", "stages.1.batch_size=8", "stages.1.log_every=1"),
        *("stages.2.num_prompts=2", "stages.2.teacher_steps=[2]", "stages.2.sampling_steps=[2, 4]"),
    ]
    recipe = load(Path("recipes") / f"{name}.yaml", small)
    bare = Distill(num_steps=1, batch_size=8)
    for key in ("condition_on_target", "num_segments", "budgets", "distance", "target"):
        assert getattr(recipe.stages[1], key) == getattr(bare, key)
    stages = pipeline.run(recipe)
    described = students.describe(stages[1].folder / "student")
    assert (described["conditioned"], described["budgets"]) == (True, [2, 3, 4, 6, 8])
    assert (stages[-1].folder / "report.html").is_file()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_name_their_schema(path):
    recipe = load(path, [])
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert recipe.name == path.stem
    is_measured_elsewhere = recipe.stages[-1].kind in ("train_teacher", "train_control")
    assert any(isinstance(stage, Evaluate) for stage in recipe.stages) or is_measured_elsewhere


def test_a_picture_that_is_drawn_over_is_in_the_metadata_and_the_same_again(finished, tmp_path):
    run = finished[1][1].folder
    (first,) = finished_runs.sample(run, ["a cat"], [2], 7, None, tmp_path)
    inputs = sample_inputs.of_command(image=first)
    assert inputs.strength == 0.5
    (over,), (again,) = (
        finished_runs.sample(run, ["a dog"], [4], 7, None, tmp_path / name, inputs=inputs) for name in ("over", "again")
    )
    assert over.read_bytes() == again.read_bytes()
    assert Image.open(over).text["image"] == str(first)
    assert Image.open(over).text["strength"] == "0.5"
    assert sample_inputs.of_command(image=first, mask=first).strength == 1.0


def test_options_of_sample_that_need_another_are_refused():
    with pytest.raises(BadArgument, match="--strength: it needs --image"):
        sample_inputs.of_command(strength=0.5)
    with pytest.raises(BadArgument, match=r"--lora: nowhere\.safetensors: no such file"):
        sample_inputs.of_command(loras=["nowhere.safetensors:0.5"])


def test_weights_pictures_and_strengths_that_cannot_be_are_refused_before_anything_is_written(finished, tmp_path):
    for weight in ("nan", "inf", "-inf"):
        with pytest.raises(
            BadArgument, match=f"--lora: .*:{weight}: the weight is {weight}; it must be a finite number"
        ):
            sample_inputs.of_command(loras=[f"{tmp_path}:{weight}"])
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(picture := tmp_path / "picture.png")
    run, out = finished[1][1].folder, tmp_path / "out"
    for given, steps, message in (
        ({"image": tmp_path / "notes.png"}, [2], "^--image: .*notes.png is not a readable picture"),
        ({"image": picture, "mask": tmp_path / "notes.png"}, [2], "^--mask: .*notes.png is not a readable picture"),
        ({"loras": [str(tmp_path)]}, [2], "^--lora: .* is a folder; name the .safetensors file in it"),
        ({"image": picture, "strength": 0.004}, [2, 8], "strength is 0.004; it must be .* large enough for 8 times"),
        ({"image": picture, "strength": 0.0}, [1], "strength is 0; it must be .* large enough for 1 times"),
    ):
        with pytest.raises(RunError, match=message):
            finished_runs.sample(run, ["a cat"], steps, 0, None, out, inputs=sample_inputs.of_command(**given))
    assert not out.exists()


def test_networks_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "config.json").write_text('{"_class_name": "ControlNetModel"}', encoding="utf-8")
    Image.new("RGB", (4, 4)).save(tmp_path / "edges.png")
    given = {"controls": [f"{tmp_path / 'control'}:0.8"], "control_images": [tmp_path / "edges.png"]}
    inputs = sample_inputs.of_command(**given, takes_edges=True)
    assert inputs.controls[0].weight == 0.8
    sample_inputs.read(inputs, "sd")
    with pytest.raises(BadArgument, match=r"--control: .* is a ControlNetModel, and .*flux takes none"):
        sample_inputs.read(inputs, "flux")
    with pytest.raises(BadArgument, match="1 networks, and 0 --control-image: give each network one"):
        sample_inputs.of_command(controls=given["controls"])
    with pytest.raises(BadArgument, match="--edges: it needs --control"):
        sample_inputs.of_command(takes_edges=True)
    with pytest.raises(BadArgument, match="--ip-adapter: it needs --ip-image"):
        sample_inputs.of_command(ip_adapter=str(tmp_path / "control"))
    adapted = sample_inputs.of_command(ip_adapter=str(tmp_path / "control"), ip_image=tmp_path / "edges.png")
    with pytest.raises(BadArgument, match="--ip-adapter: a teacher of family sana takes no IP-Adapter"):
        sample_inputs.read(adapted, "sana")
    assert "control" in inputs.record()
    assert "ip_image" in adapted.record()
