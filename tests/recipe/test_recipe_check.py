"""What is wrong with a recipe beyond its types: files that are not there, stages that do not find what they need."""

import json
from importlib import import_module
from typing import get_args

import pytest

from mlcm_rl.recipe import Teacher, experiment
from mlcm_rl.recipe.families import FAMILIES
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders
from mlcm_rl.recipe.tree import RecipeError, key_text

REVISION = f"teacher.revision='{40 * '0'}'"


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "text"),
    [
        ("path: teacher", "path: ./techer", 5, "teacher.path", "no such folder: ./techer; did you mean teacher?"),
        ("path: teacher", "path: data", 5, "teacher.path", "the folder data holds no model_index.json"),
        ("path: teacher", "path: data/tiny", 5, "teacher.path", "no such folder: data/tiny"),
        ("data/prompts.txt", "data/prompt.txt", 10, "stages[0].prompts", "did you mean data/prompts.txt?"),
        ("data/prompts.txt", "elsewhere/prompts.txt", 10, "stages[0].prompts", "no such file: elsewhere/prompts.txt"),
        (
            "data/prompts.txt",
            "teacher/model_index.json",
            10,
            "stages[0].prompts",
            "expected a .txt or .jsonl file, found",
        ),
        ("judge: judge", "judge: juge", 24, "stages[2].judge", "no such folder: juge; did you mean judge?"),
        ("[colourfulness]", "[colorfulness]", 25, "stages[2].rewards[0]", "did you mean colourfulness?"),
        ("judge: judge", "also: [runs/x]", 24, "stages[2].also[0]", "no such folder: runs/x"),
        ("judge: judge", "also: [data]", 24, "stages[2].also[0]", "data is no finished stage and no run of one"),
        ("data/prompts.txt", '""', 10, "stages[0].prompts", "expected a path, found empty text"),
        ("path: teacher", 'path: ""', 5, "teacher.path", "expected a path, found empty text"),
        ("precision: no", "images: data", 16, "stages[1].images", "the folder data holds no metadata.jsonl"),
    ],
)
def test_a_file_that_is_not_there_is_told_with_the_line_that_names_it(broken, old, new, line, key, text):
    (problem,) = broken((old, new))
    assert (problem.place.line, key_text(problem.key)) == (line, key)
    assert text in problem.text


def test_only_a_folder_is_proposed_for_a_folder(broken, root):
    (root / "juge.txt").touch()
    (problem,) = broken(("judge: judge", "judge: juge"))
    assert problem.nearest == "judge"


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        (
            "StableDiffusionPipeline",
            "sdxl does not load the StableDiffusionPipeline that is in teacher; did you mean sd?",
        ),
        ("KandinskyPipeline", "sdxl does not load the KandinskyPipeline that is in teacher"),
    ],
)
def test_a_teacher_of_another_family_is_told_when_the_recipe_is_read(broken, root, class_name, message):
    (root / "teacher" / "model_index.json").write_text(f'{{"_class_name": "{class_name}"}}')
    (problem,) = broken(overrides=("seed=1",))
    assert (key_text(problem.key), problem.text) == ("teacher.family", message)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", ["pipeline", "TargetTimePipeline"]], ids=str)
@pytest.mark.parametrize(
    ("scheduler", "described", "reason"),
    [
        ("LCMScheduler", False, "its model_index.json names LCMScheduler"),
        ("TCDScheduler", False, "its model_index.json names TCDScheduler"),
        ("DDIMScheduler", True, "`mlcm export` wrote it (student.json lies in it)"),
    ],
)
def test_a_student_in_the_teachers_place_is_told_when_the_recipe_is_read(
    broken, root, name, scheduler, described, reason
):
    index = {"_class_name": name, "scheduler": ["diffusers", scheduler]}
    (root / "teacher" / "model_index.json").write_text(json.dumps(index))
    if described:
        (root / "teacher" / "student.json").write_text("{}")
    (problem,) = broken(overrides=("seed=1",))
    assert key_text(problem.key) == "teacher.path"
    assert problem.text.startswith(f"teacher is a student, for a few steps, already: {reason}")


@pytest.mark.parametrize("scheduler", [[], ["diffusers"], "LCMScheduler", None, ["diffusers", ["LCMScheduler"]]])
def test_an_index_that_names_no_scheduler_is_no_students(broken, root, scheduler):
    index = {"_class_name": "StableDiffusionXLPipeline", "scheduler": scheduler}
    (root / "teacher" / "model_index.json").write_text(json.dumps(index))
    assert not any("is a student" in problem.text for problem in broken(overrides=("seed=1",)))


@pytest.mark.parametrize(
    "class_name",
    ["StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionUpscalePipeline"],
)
def test_a_model_of_another_task_is_told_with_what_to_name(broken, root, class_name):
    (root / "teacher" / "model_index.json").write_text(f'{{"_class_name": "{class_name}"}}')
    (problem,) = broken(overrides=("seed=1",))
    assert key_text(problem.key) == "teacher.path"
    expected = f"teacher is of the class {class_name}, no plain text-to-image model: name the one that it was made from"
    assert problem.text == f"{expected} (a refiner's base)"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("stabilityai/sdxl-turbo", "distilled to a few steps already, by its name (turbo)"),
        ("owner/DreamShaperXL_v2_Lightning", "distilled to a few steps already, by its name (lightning)"),
        ("owner/Juggernaut-XL-9-Hyper", "distilled to a few steps already, by its name (hyper)"),
        ("owner/stable-diffusion-xl-refiner-1.0", "no plain text-to-image model, by its name (refiner)"),
        ("owner/stable-diffusion-2-inpainting", "no plain text-to-image model, by its name (inpainting)"),
    ],
)
def test_a_hub_name_that_says_what_it_is_is_refused_when_the_recipe_is_read(broken, name, word):
    (problem,) = broken(overrides=(f"teacher.path={name}", REVISION))
    assert (key_text(problem.key), problem.text) == (
        "teacher.path",
        f"{name} is {word}: name the text-to-image model that it was made from",
    )


@pytest.mark.parametrize("name", ["lightning-ai/photos", "owner/turbocharged", "owner/falcma"])
def test_other_names_are_nobodys_business(root, name):
    assert load(root / "good.yaml", [f"teacher.path={name}", REVISION], root).teacher.path == name


# What a published folder says of itself: (file, change, the line of the message).
FOLDERS = [
    (
        "scheduler/scheduler_config.json",
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        "scheduler/scheduler_config.json: timestep_spacing trailing of a EulerAncestralDiscreteScheduler that predicts "
        "epsilon is how models that are distilled to a few steps are published (Turbo, Lightning)",
    ),
    (
        "unet/config.json",
        {"_name_or_path": "stabilityai/sdxl-turbo"},
        "unet/config.json: _name_or_path: 'stabilityai/sdxl-turbo' is distilled to a few steps already",
    ),
    (
        "model_index.json",
        {"requires_aesthetics_score": True},
        "model_index.json: requires_aesthetics_score true is of a refiner",
    ),
    ("unet/config.json", {"in_channels": 9}, "nine are of an inpainting model: name the one that it was made from"),
    ("unet/config.json", {"in_channels": 8}, "only plain text-to-image teachers can be distilled"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "is distilled already; name the model that it was made from"),
    (
        "unet/config.json",
        {"projection_class_embeddings_input_dim": 1280 + 5 * 256},
        "found 2560; five sizes are of a refiner: name its base model",
    ),
    (
        "scheduler/scheduler_config.json",
        {"prediction_type": "flow_prediction"},
        "found 'flow_prediction'; no other prediction can be distilled: name a teacher with one of these",
    ),
]


@pytest.mark.parametrize(("file", "change", "text"), FOLDERS, ids=[next(iter(change)) for _, change, _ in FOLDERS])
def test_a_folder_that_says_what_it_is_is_refused_when_the_recipe_is_read(broken, root, file, change, text):
    path = root / "teacher" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (problem,) = broken(overrides=("seed=1",))
    assert key_text(problem.key) == "teacher.path"
    assert text in problem.text


def test_trailing_times_are_no_students_by_themselves(root):
    path = root / "teacher" / "scheduler" / "scheduler_config.json"
    before = json.loads(path.read_text())
    for change in (
        {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ):
        path.write_text(json.dumps(before | change))
        load(root / "good.yaml", root=root)


def test_a_single_file_is_told_with_the_command_that_makes_a_folder_of_it(broken, root):
    (root / "model.safetensors").touch()
    (problem,) = broken(("path: teacher", "path: model.safetensors"))
    assert key_text(problem.key) == "teacher.path"
    assert problem.text.startswith(
        "model.safetensors is one file: `mlcm convert model.safetensors FOLDER --like BASE` makes a folder of it"
    )


@pytest.mark.parametrize(
    ("lora", "key", "text"),
    [
        (
            "lora: style.safetensors",
            "teacher.lora",
            "no such file: style.safetensors; did you mean styles.safetensors?",
        ),
        ("lora: data", "teacher.lora", "expected a file, found the folder data"),
        ('lora: ""', "teacher.lora", "expected a path, found empty text"),
        ("lora: data/prompts.txt", "teacher.lora", "expected a .safetensors file, found data/prompts.txt"),
        ("lora_weight: 0.5", "teacher.lora_weight", "it has no effect without teacher.lora"),
    ],
)
def test_a_lora_that_is_not_there_is_told_with_its_key(broken, root, lora, key, text):
    (root / "styles.safetensors").touch()
    (problem,) = broken(("path: teacher", f"path: teacher\n  {lora}"))
    assert (problem.place.line, key_text(problem.key)) == (6, key)
    assert problem.text.startswith(text)


def test_a_lora_over_a_family_whose_pipeline_loads_none_is_refused_by_its_key(broken):
    problems = broken(
        ("family: sdxl", "family: pixart_sigma"), ("path: teacher", "path: teacher\n  lora: a.safetensors")
    )
    messages = [problem.text for problem in problems if problem.key == ("teacher", "lora")]
    assert "diffusers loads no LoRA into a PixArtSigmaPipeline: merge it into the checkpoint" in messages


def test_a_lora_is_looked_for_beside_the_recipe_and_no_teacher_is_trained_with_it(broken, root):
    (root / "style.safetensors").touch()
    text = (root / "good.yaml").read_text().replace("path: teacher", "path: teacher\n  lora: style.safetensors")
    (root / "lora.yaml").write_text(text)
    assert load(root / "lora.yaml", root=root / "data").teacher.lora == str(root / "style.safetensors")
    stage = "- {kind: train_teacher, images: data, num_steps: 1, batch_size: 1}\n  - kind: trajectories"
    (root / "data" / "metadata.jsonl").touch()
    lora = ("path: teacher", "path: teacher\n  lora: style.safetensors")
    (problem,) = broken(lora, ("- kind: trajectories", stage))
    assert key_text(problem.key) == "stages[0]"
    assert problem.text.startswith("train_teacher writes a checkpoint of its own")


def test_a_side_that_the_teacher_cannot_halve_is_told_when_the_recipe_is_read(broken, root):
    (problem,) = broken(overrides=("teacher.resolution=1000",))  # SDXL halves a side three times, then twice
    assert key_text(problem.key) == "teacher.resolution"
    assert problem.text == "expected a multiple of 32, as teacher needs, found 1000"
    assert load(root / "good.yaml", ("teacher.resolution=992",), root).teacher.resolution == 992


def test_every_family_is_known_by_its_pipeline():
    for name, layout in FAMILIES.items():
        module, _, kind = layout.implementation.partition(":")
        family = getattr(import_module(module), kind)
        assert (family.family, family.pipeline_class.__name__) == (name, layout.pipeline)
        assert (family.denoiser_part, family.denoiser_class.__name__) == (layout.denoiser, layout.denoiser_class)
    assert set(FAMILIES) == set(get_args(Teacher.model_fields["family"].annotation))


@pytest.mark.parametrize("path", ["stabilityai/sdxl-base", "runwayml/stable-diffusion-v1-5"])
def test_a_hub_name_is_not_looked_for_on_disk_and_needs_a_revision(broken, root, path):
    assert load(root / "good.yaml", [f"teacher.path={path}", REVISION], root).teacher.path == path
    (problem,) = broken(overrides=(f"teacher.path={path}",))
    assert key_text(problem.key) == "teacher.revision"
    assert f"{path} is not a folder here, and a hub name needs its commit" in problem.text


@pytest.mark.parametrize("revision", ["main", "0" * 39, "0" * 41, "g" * 40])
def test_a_revision_is_a_commit(broken, revision):
    (problem,) = broken(overrides=("teacher.path=gpt2", f"teacher.revision='{revision}'"))
    assert key_text(problem.key) == "teacher.revision"
    assert "expected the 40 hexadecimal digits of a commit" in problem.text


def test_a_path_that_is_no_hub_name_is_looked_for_whatever_the_revision(broken):
    (problem,) = broken(overrides=("teacher.path=some/where/else", REVISION))
    assert problem.text == "no such folder: some/where/else"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data/prompts.txt", "teacher", "expected a file, found the folder teacher"),
        ("judge: judge", "judge: data/eval.jsonl", "expected a folder, found the file data/eval.jsonl"),
    ],
)
def test_a_folder_in_place_of_a_file_is_called_one(broken, old, new, message):
    assert {problem.text for problem in broken((old, new))} == {message}


@pytest.mark.parametrize(("runs", "value"), [("", "empty text"), ("good.yaml", "the file good.yaml")])
def test_runs_are_kept_in_a_folder(broken, runs, value):
    (problem,) = broken(overrides=(f"runs='{runs}'",))
    assert key_text(problem.key) == "runs"
    assert problem.text == f"expected a folder, which need not be there yet, found {value}"


def test_what_paths_are_relative_to_is_said_once(root):
    with pytest.raises(RecipeError) as raised:
        load(root / "good.yaml", ["teacher.path=nowhere", "stages.2.judge=nowhere"], root)
    assert raised.value.note == f"paths on the command line are relative to the working directory, here {root}"
    assert str(raised.value).count("are relative to the working") == 1
    with pytest.raises(RecipeError) as raised:
        load(root / "good.yaml", [f"teacher.path={root / 'nowhere'}"], root)
    assert raised.value.note == ""


def test_a_pinned_revision_makes_any_teacher_a_hub_name(root):
    assert load(root / "good.yaml", ["teacher.path=gpt2", REVISION], root).teacher.path == "gpt2"


def test_nothing_is_looked_for_on_disk_when_only_the_types_are_asked_for(root):
    assert load(root / "good.yaml", ["teacher.path=nowhere"]).teacher.path == "nowhere"


def test_check_alone_gives_the_same_problems_without_places(root):
    recipe = load(root / "good.yaml", ["teacher.path=nowhere", "stages.2.judge=nowhere"])
    assert [(key_text(problem.key), problem.place) for problem in check(recipe, Folders(root, root))] == [
        ("teacher.path", None),
        ("stages[2].judge", None),
    ]


STORE = "  - kind: trajectories\n    prompts: data/prompts.txt\n    num_trajectories: 64\n"
ONLINE = "precision: no\n    source: online\n    prompts: data/prompts.txt\n    target: consistency"


@pytest.mark.parametrize(
    ("change", "key", "text"),
    [
        ("precision: no", "stages[0].source", "source: trajectories needs an earlier trajectories stage"),
        (
            "num_segments: [1]\n    method: inter_segment",
            "stages[0].renoise",
            "renoise: stored needs an earlier trajectories stage",
        ),
    ],
)
def test_distillation_on_stored_states_needs_a_store_before_it(broken, change, key, text):
    (problem,) = broken((STORE, ""), ("precision: no", change), ("[40, 30, 20, 10]", "40"))
    assert key_text(problem.key) == key
    assert text in problem.text


def test_online_distillation_needs_no_store(root):
    text = (root / "good.yaml").read_text("utf-8").replace(STORE, "").replace("precision: no", ONLINE)
    (root / "good.yaml").write_text(text, "utf-8")
    assert [stage.kind for stage in load(root / "good.yaml", root=root).stages] == ["distill", "evaluate"]


def test_evaluation_needs_a_student_of_this_recipe_or_another(broken, root):
    evaluate = "  - kind: evaluate\n    prompts: data/eval.jsonl\n    num_prompts: 8\n"
    early = evaluate + "  - kind: distill"
    (problem,) = broken(("  - kind: distill", early))
    assert (problem.place.line, key_text(problem.key)) == (12, "stages[1]")
    assert problem.text == "nothing to evaluate, without finished stages in also: it needs an earlier distill stage"
    (root / "other").mkdir()
    (root / "other" / "manifest.json").touch()
    text = (
        (root / "good.yaml")
        .read_text("utf-8")
        .replace("  - kind: distill", evaluate + "    also: [other]\n  - kind: distill")
    )
    (root / "good.yaml").write_text(text, "utf-8")
    assert len(load(root / "good.yaml", root=root).stages) == 4


def test_an_adapter_is_not_trained_in_float16(broken, root):
    half = "teacher.dtype=float16"
    (problem,) = broken(overrides=(half,))
    assert (problem.place.line, key_text(problem.key)) == (16, "stages[1].precision")
    assert problem.nearest == ""
    assert "write bf16, or teacher.dtype: float32" in problem.text
    tuned = "  - kind: feedback\n    prompts: data/prompts.txt\n    num_steps: 4\n    batch_size: 2\n"
    tuned += (
        "    learning_rate: 1e-4\n    rewards: [{name: colourfulness}]\n    guard: {rewards: [{name: brightness}]}\n"
    )
    both = broken(("  - kind: evaluate\n", tuned + "  - kind: evaluate\n"), overrides=(half,))
    assert [key_text(problem.key) for problem in both] == ["stages[1].precision", "stages[2].precision"]
    # A full student has weights of its own, in float32.
    for changes in ("stages.distill.precision=bf16",), ("stages.distill.adapter={kind: full}",):
        assert load(root / "good.yaml", [half, *changes], root).teacher.dtype == "float16"


def test_all_weights_are_not_trained_over_a_quantised_teacher_and_its_library_must_be_there(broken, monkeypatch):
    monkeypatch.setattr(experiment, "find_spec", lambda name: name)
    quantised = "teacher.quantise=nf4"
    (full,) = broken(overrides=(quantised, "stages.distill.adapter={kind: full}"))
    assert key_text(full.key) == "stages[1].adapter"
    assert full.text.endswith("keeps them in nf4: train a lora, or leave teacher.quantise out")
    first = "  - kind: train_teacher\n    images: data\n    num_steps: 4\n    batch_size: 2\n  - kind: trajectories\n"
    problems = {
        key_text(one.key): one.text for one in broken(("  - kind: trajectories\n", first), overrides=(quantised,))
    }
    assert problems["teacher.quantise"].startswith("stages[0] trains all weights")
    monkeypatch.setattr(experiment, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    (missing,) = broken(overrides=(quantised,))
    assert key_text(missing.key) == "teacher.quantise"
    assert "bitsandbytes, which is not installed: pip install 'mlcm-rl[quantised]'" in missing.text
    (unknown,) = broken(overrides=("teacher.quantise=int4",))
    assert "int8" in unknown.text


AGAIN = "  - kind: distill\n    method: inter_segment\n    num_segments: [1]\n    batch_size: 16\n    num_steps: 10\n"


def test_a_distill_stage_goes_on_with_the_adapter_and_the_input_of_the_one_before_it(broken, root):
    change = ("  - kind: evaluate\n", AGAIN + "  - kind: evaluate\n")
    (problem,) = broken(change)  # its adapter is the default one
    assert key_text(problem.key) == "stages[2].adapter"
    assert "adapter must be that of stages[1]" in problem.text
    problems = broken(change, overrides=("stages.1.condition_on_target=true", "stages.1.target=trajectory"))
    assert [key_text(problem.key) for problem in problems] == ["stages[2].adapter", "stages[2].condition_on_target"]
    text = (root / "good.yaml").read_text("utf-8").replace(*change)
    (root / "good.yaml").write_text(text, "utf-8")
    assert len(load(root / "good.yaml", ["stages.2.adapter={kind: lora, rank: 8}"], root).stages) == 4


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("stages.trajectories.solver_steps=1000", "stages[0].solver_steps", "from 8 to 992"),
        ("stages.distill.betas=[0.9, 1.0]", "stages[1].betas[1]", "from 0 to below 1"),
        ("stages.evaluate.teacher_steps=[1000]", "stages[2].teacher_steps[0]", "from 1 to 999"),
        ("stages.distill.num_segments=[8,8,8,8,8,4,4,4,2,2,1]", "stages[1].num_segments", "list"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(broken, override, key, text):
    (problem,) = broken(overrides=(override,))
    assert key_text(problem.key) == key
    assert text in problem.text


def test_the_logarithm_is_not_weighed_once_more(broken):
    problems = broken(overrides=("stages.distill.space=x0", "stages.distill.distance=log_l2"))
    assert [key_text(problem.key) for problem in problems] == ["stages[1].distance"]
    assert "with log_l2 take space: z" in problems[0].text


def test_a_store_of_milestones_is_refused_where_a_stage_reads_more(root):
    text = (root / "good.yaml").read_text("utf-8")
    (root / "good.yaml").write_text(text.replace("trajectories: 64", "trajectories: 64\n    keep: milestones"), "utf-8")
    message = r"stages\[0\]\.keep: milestones leaves out states that stages\[1\] \(distill\) begins its jumps at"
    with pytest.raises(RecipeError, match=message):
        load(root / "good.yaml", root=root)
    bare = load(root / "good.yaml", ["stages.1.num_steps=40"], root)  # which has budgets
    assert bare.stages[0].keep == "milestones"
