"""Exports opened and sampled by stock diffusers in a process without mlcm_rl, beside our sampler on the same noise."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import tiny
from mlcm_rl import recipe
from mlcm_rl.equations.prediction import X0
from mlcm_rl.equations.segments import paper_times, sampling_times
from mlcm_rl.equations.solver import ddim_step, gamma_step, time_before_noise
from mlcm_rl.models import lora_files, sampler, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.export import STOCK_STEPS, export
from mlcm_rl.models.students import Student
from mlcm_rl.models.teachers import load
from mlcm_rl.recipe import Full, Lora

PROMPTS, SEED = ["a red apple", "红苹果"], 7
ALL_STEPS = [{"steps": steps} for steps in range(1, 9)]
SOME_STEPS = [{"steps": steps} for steps in (1, 2, 4, 8)]
WITH_ETA = [{"steps": steps, "eta": 0.3} for steps in (1, 2, 4)]
PAPER = [{"timesteps": list(paper_times(4))}]


@dataclass
class Case:
    """A student, what of its export to open, and how to sample it."""

    name: str
    teacher: str
    adapter: Lora | Full
    num_segments: int
    calls: list[dict]
    conditioned: bool = False
    job: dict = field(default_factory=dict)  # of stock_samples.py; {teacher} and {out} stand for the folders
    of: str | None = None  # the case whose export this one opens, its own by default

    tuned_under: float | None = None
    prediction: str | None = None  # the teacher's by default

    @property
    def gamma(self) -> float:
        if self.tuned_under is not None:
            return self.tuned_under
        return 1.0 if self.num_segments == 1 and not self.conditioned else 0.0


LORA = Lora(rank=4, alpha=8.0)
OVER_TEACHER = {"folder": "{teacher}", "lora": "{out}", "scheduler": "{out}/scheduler"}
AGAIN = {"trust": True, "again": "{out}/../../saved-again"}
CASES = [
    Case("renoising", "sdxl", LORA, 1, ALL_STEPS + PAPER),
    Case("renoising-lora-over-its-teacher", "sdxl", LORA, 1, SOME_STEPS, of="renoising", job=OVER_TEACHER),
    Case("deterministic", "sdxl-no-zeros", Full(), 4, ALL_STEPS + PAPER),
    Case("deterministic-sd15-lora", "sd15", LORA, 2, SOME_STEPS),
    Case("renoising-sd21", "sd21", Full(), 1, SOME_STEPS),
    Case("deterministic-full", "sdxl", Full(), 4, SOME_STEPS),
    Case("conditioned", "sdxl", LORA, 1, ALL_STEPS, conditioned=True, job={"trust": True}),
    Case("conditioned-saved-again", "sdxl", LORA, 1, SOME_STEPS, True, AGAIN, "conditioned"),
    Case("conditioned-renoising", "sdxl", LORA, 1, SOME_STEPS, conditioned=True, job={"trust": True}, tuned_under=1.0),
    Case("tuned-between", "sdxl", LORA, 1, WITH_ETA, tuned_under=0.3),
    Case("conditioned-between", "sdxl", LORA, 1, WITH_ETA, conditioned=True, job={"trust": True}, tuned_under=0.3),
    Case("renoising-tuned-deterministic", "sdxl", LORA, 1, SOME_STEPS, tuned_under=0.0),
    Case("conditioned-sd15", "sd15", Full(), 1, SOME_STEPS, conditioned=True, job={"trust": True}),
    Case("x0", "sdxl", LORA, 1, SOME_STEPS, prediction=X0),
    Case("x0-over-its-teacher", "sdxl", LORA, 1, SOME_STEPS, of="x0", job=OVER_TEACHER, prediction=X0),
    Case("x0-deterministic", "sdxl-no-zeros", Full(), 2, SOME_STEPS, prediction=X0),
    Case("x0-conditioned", "sd15", LORA, 1, SOME_STEPS, conditioned=True, job={"trust": True}, prediction=X0),
]  # fmt: skip

CARDS = {  # whose code is run: the pictures that it leaves
    "renoising": ["adapter", "sample"],
    "tuned-between": ["adapter", "sample"],
    "deterministic-full": ["sample", "steps-2", "steps-4"],
    "conditioned": ["sample", "steps-2", "steps-6"],
    "conditioned-between": ["sample", "steps-2", "steps-6"],
    "conditioned-sd15": ["sample", "steps-2"],
    "x0": ["adapter", "sample"],
}
SNAPSHOTS = {2: CASES[0], 4: CASES[5]}  # beside `deterministic-full`: an adapter, and full weights
TOLD = [("conditioned", steps) for steps in STOCK_STEPS]
TOLD += [(case.name, steps) for case in CASES[7:] if case.conditioned and not case.of for steps in (2, 8)]


@dataclass
class Exported:
    """Folders of students and of their exports, and the latents that stock diffusers drew."""

    root: Path
    latents: dict[str, dict[str, torch.Tensor]]

    def out(self, case: Case) -> Path:
        return self.root / "exports" / (case.of or case.name)

    def student(self, case: Case) -> Path:
        return self.root / "students" / (case.of or case.name)


@pytest.fixture(scope="module")
def exported(loaded, teachers, tmp_path_factory) -> Exported:
    found = Exported(tmp_path_factory.mktemp("exported"), {})
    for case in CASES:
        if case.of is None:
            _export(loaded[case.teacher], case, found)
    jobs = [_job(loaded[case.teacher], case, found) for case in CASES]
    jobs += [_snapshot_job(loaded["sdxl"], found, "deterministic-full", steps) for steps in SNAPSHOTS]
    cases = {case.name: case for case in CASES}
    jobs += [_snapshot_job(loaded[cases[name].teacher], found, name, steps, cases[name]) for name, steps in TOLD]
    _run_stock(found.root, jobs, [file for case in CARDS for file in _code_of_card(found, cases[case], teachers)])
    found.latents = {Path(job["out"]).stem: load_file(job["out"]) for job in jobs}
    return found


def _export(base: Base, case: Case, found: Exported) -> None:
    denoiser = students.student(base, case.adapter, 0, case.conditioned, prediction_type=case.prediction)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    description = {"num_segments": case.num_segments, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(denoiser, found.student(case), description)
    has_snapshots = case.name == "deterministic-full"
    snapshots = {steps: found.student(one) for steps, one in SNAPSHOTS.items()} if has_snapshots else None
    table = "| steps | R@5 |\n|---|---|\n| 4 | 0.9 |"
    export(found.student(case), base, found.out(case), table, snapshots, case.tuned_under)


def _job(base: Base, case: Case, found: Exported) -> dict:
    places = {"teacher": base.teacher.path, "out": found.out(case)}
    named = {key: value.format(**places) if isinstance(value, str) else value for key, value in case.job.items()}
    job = {"folder": str(found.out(case)), "prompts": PROMPTS, "seed": SEED, "calls": case.calls} | named
    return job | {"out": str(found.root / f"{case.name}.safetensors")}


def _snapshot_job(base: Base, found: Exported, name: str, steps: int, case: Case | None = None) -> dict:
    """Stock use, over the teacher, of what lies beside the export `name` for so many steps."""
    folder = found.root / "exports" / name / f"steps-{steps}"
    part = {"unet": str(folder / "unet")} if (folder / "unet").is_dir() else {"lora": str(folder)}
    job = part | {"scheduler": str(folder / "scheduler"), "calls": [_call(case, steps)]}
    job |= {"folder": base.teacher.path, "prompts": PROMPTS, "seed": SEED}
    return job | {"out": str(found.root / f"{name}-steps-{steps}.safetensors")}


def _call(case: Case | None, steps: int) -> dict:
    return {"steps": steps} | ({"eta": case.gamma} if case and 0.0 < case.gamma < 1.0 else {})


def _code_of_card(found: Exported, case: Case, teachers: dict[str, Path]) -> list[Path]:
    """Every block of code of an export's card, as a file in a folder where the export and its teacher lie."""
    folder = found.root / "cards" / case.name
    folder.mkdir(parents=True)
    for one in (found.out(case), teachers[case.teacher]):
        (folder / one.name).symlink_to(one)
    files = []
    for i, block in enumerate((found.out(case) / "README.md").read_text().split("```python\n")[1:]):
        files.append(folder / f"block-{i}.py")
        files[-1].write_text(block.split("```")[0])
    return files


def _run_stock(root: Path, jobs: list[dict], code: list[Path]) -> None:
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = Path(__file__).with_name("stock_samples.py")
    subprocess.run(
        [sys.executable, str(program), str(root / "jobs.json"), *map(str, code)],
        cwd=root,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")},
        check=True,
    )


def _ours(base: Base, case: Case, student: Student, call: dict) -> torch.Tensor:
    """Our sampler's latents, noise drawn as the pipelines do: one generator for the start and every step.

    For gamma below 1 they are carried from the last x0 on to index 0, where TCDScheduler ends.
    """
    times = call.get("timesteps") or sampling_times(call["steps"])
    generator = torch.Generator().manual_seed(SEED)
    noise, conditioning = base.noise(generator, len(PROMPTS)), base.encode_prompts(PROMPTS)
    options = {"gamma": case.gamma, "generators": generator, "conditioned": case.conditioned}
    x0 = sampler.sample(base, student.denoiser, conditioning, noise, times, **options)
    if case.gamma == 1.0:
        return x0
    generator.manual_seed(SEED)
    base.noise(generator, len(PROMPTS))
    return _to_index_0(base, student, conditioning, noise, times, x0, case.gamma, generator)


@torch.no_grad()
def _to_index_0(base, student, conditioning, noise, times, x0, gamma, generator):
    """DDIM from the sampler's last state, walked to again, to index 0."""
    x_t = noise
    for t, s in zip(times, [*times[1:], 0], strict=True):
        t, s = torch.full((2,), t), torch.full((2,), s)
        told = time_before_noise(s, gamma) if student.conditioned else None
        seen, last = base.x0(student.denoiser, x_t, t, conditioning, told), (x_t, t)
        if s[0]:
            fresh = base.noise(generator, len(noise)) if gamma else noise
            x_t = gamma_step(x_t, seen, t, s, fresh, gamma, base.schedule)
    assert torch.equal(seen, x0)
    return ddim_step(last[0], x0, last[1], s, base.schedule)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stock_pipeline_samples_an_export_as_our_sampler_does(case, loaded, exported):
    base = loaded[case.teacher]
    student = students.load_student(base, exported.student(case))
    assert student.default_gamma == case.gamma or case.tuned_under is not None
    for i, call in enumerate(case.calls):
        assert_close(exported.latents[case.name][str(i)], _ours(base, case, student, call))


def test_an_export_that_predicts_x0_says_so_to_every_reader_and_has_no_file_that_cannot(loaded, exported):
    """Its scheduler, its description and its card; a LoRA in kohya's layout would be read as noise."""
    out = exported.root / "exports" / "x0"
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "sample"
    assert students.describe(out)["prediction_type"] == "sample"
    assert (out / lora_files.LORA_FILE).is_file()
    assert not (out / "kohya_lora_weights.safetensors").exists()
    assert (exported.root / "exports" / "renoising" / "kohya_lora_weights.safetensors").is_file()
    card = (out / "README.md").read_text()
    assert "Its network predicts x0, where its teacher predicts epsilon" in card
    assert "`mlcm export --format\ncomfyui` writes workflows that do" in card
    told = json.loads((exported.root / "exports/x0-conditioned/steps-2/scheduler/scheduler_config.json").read_text())
    assert told["prediction_type"] == "sample"
    teacher = loaded["sdxl"].stock_scheduler(1.0)
    assert teacher.config.prediction_type == "epsilon"


@pytest.mark.parametrize("steps", SNAPSHOTS)
def test_snapshot_beside_an_export_is_sampled_over_the_teacher(steps, loaded, exported):
    base, case = loaded["sdxl"], SNAPSHOTS[steps]
    expected = _ours(base, case, students.load_student(base, exported.student(case)), {"steps": steps})
    assert_close(exported.latents[f"deterministic-full-steps-{steps}"]["0"], expected)


@pytest.mark.parametrize(("name", "steps"), TOLD)
def test_a_conditioned_student_is_written_for_stock_pipelines_at_each_number_of_steps(name, steps, loaded, exported):
    (case,) = (case for case in CASES if case.name == name)
    base = loaded[case.teacher]
    expected = _ours(base, case, students.load_student(base, exported.student(case)), {"steps": steps})
    assert_close(exported.latents[f"{name}-steps-{steps}"]["0"], expected)


def test_an_adapter_holds_a_conditioned_student_for_as_many_steps_as_its_rank(exported):
    """Of rank 4 here; beyond it the denoiser is written whole."""
    files = {steps: exported.root / "exports" / "conditioned" / f"steps-{steps}" for steps in STOCK_STEPS}
    assert [steps for steps, folder in files.items() if (folder / lora_files.LORA_FILE).is_file()] == [2, 3, 4]
    assert [steps for steps, folder in files.items() if (folder / "unet").is_dir()] == [6, 8]


@pytest.mark.parametrize(("case", "pictures"), CARDS.items())
def test_every_block_of_code_of_a_card_runs_and_leaves_a_picture(case, pictures, exported):
    assert sorted(path.stem for path in (exported.root / "cards" / case).glob("*.png")) == pictures
    for name in pictures:
        assert (exported.root / "cards" / case / f"{name}.png").stat().st_size > 0


def test_conditioned_export_is_not_opened_by_a_stock_pipeline(exported):
    for pipeline_class in (DiffusionPipeline, StableDiffusionXLPipeline):
        with pytest.raises(ValueError, match="custom code"):
            pipeline_class.from_pretrained(exported.root / "exports" / "conditioned")


def test_default_grid_is_the_stock_schedulers_at_every_number_of_steps(loaded):
    for gamma in (0.0, 1.0):
        scheduler = loaded["sdxl"].stock_scheduler(gamma)
        for num_steps in range(1, 9):
            scheduler.set_timesteps(num_steps)
            assert scheduler.timesteps.tolist() == sampling_times(num_steps)


def test_card_names_teacher_licence_grids_and_measurements(loaded, teachers, tmp_path):
    base = loaded["sd21"]
    (teachers["sd21"] / "README.md").write_text("---\nlicense: openrail++\ntags: []\n---\n# A teacher\n")
    (teachers["sd21"] / "LICENSE.md").write_text("You may.")
    description = {"num_segments": 2, "family": "sd", "prediction_type": "v_prediction"}
    students.save_student(students.student(base, LORA, 0), tmp_path / "student", description)
    out = export(tmp_path / "student", base, tmp_path / "out", "| a | b |\n|---|---|\n| 1 | 2 |")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: openrail++\nlibrary_name: diffusers\n")
    assert "[999, 749, 499, 124]" in card  # the paper's four
    assert "| 3 | [999, 749, 374] | [999, 499, 124] | [999, 749, 499] |" in card  # with two segments' own
    assert "| 1 | 2 |" in card
    assert "TCDScheduler" in card
    assert (out / "LICENSE.md").read_text() == "You may."
    with pytest.raises(FileExistsError, match="out is there already"):
        export(tmp_path / "student", base, out)


@pytest.mark.parametrize(
    ("budgets", "said", "grids"), [([], "1 to 8", 8), ([8, 2, 4], "2, 4 and 8", 3), ([4], "4", 1)], ids=str
)
def test_card_claims_the_numbers_of_steps_that_were_learned_and_no_other(loaded, tmp_path, budgets, said, grids):
    base = loaded["sdxl"]
    description = {"num_segments": 1, "family": "sdxl", "prediction_type": "epsilon", "budgets": budgets}
    students.save_student(students.student(base, LORA, 0, True), tmp_path / "student", description)
    card = (export(tmp_path / "student", base, tmp_path / "out") / "README.md").read_text()
    assert f"for {said} steps, made by" in card
    assert len([line for line in card.splitlines() if "| [999" in line]) == grids


def test_export_is_whole_or_absent_and_refuses_a_conditioned_snapshot(loaded, tmp_path):
    base = loaded["sdxl"]
    description = {"num_segments": 1, "family": "sdxl", "prediction_type": "epsilon"}
    students.save_student(students.student(base, LORA, 0, True), tmp_path / "told", description)
    with pytest.raises(ValueError, match="conditioned on its target time"):
        export(tmp_path / "told", base, tmp_path / "out", snapshots={4: tmp_path / "told"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["told"]


def test_export_keeps_the_resolution_it_was_distilled_at_and_leaves_the_teacher_alone(teachers, tmp_path):
    base = load(recipe.Teacher(path=str(teachers["sdxl"]), family="sdxl", resolution=24), "cpu")
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    description = {"num_segments": 1, "family": "sdxl", "prediction_type": "epsilon"}
    denoiser = students.student(base, LORA, 0)
    tiny.perturb(students.trainable_parameters(denoiser))
    students.save_student(denoiser, tmp_path / "student", description)
    out = export(tmp_path / "student", base, tmp_path / "out")
    assert json.loads((out / "unet" / "config.json").read_text())["sample_size"] == 12
    assert (base.denoiser.config.sample_size, type(base.pipeline.scheduler).__name__) == (8, "EulerDiscreteScheduler")
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())


def test_export_of_a_half_precision_teacher_opens_in_one_precision(teachers, tmp_path):
    base = load(recipe.Teacher(path=str(teachers["sdxl"]), family="sdxl", dtype="bfloat16"), "cpu")
    description = {"num_segments": 1, "family": "sdxl", "prediction_type": "epsilon"}
    student = students.student(base, LORA, 0)
    tiny.perturb(students.trainable_parameters(student))
    students.save_student(student, tmp_path / "student", description)
    stock = DiffusionPipeline.from_pretrained(export(tmp_path / "student", base, tmp_path / "out"))
    stock.set_progress_bar_config(disable=True)
    modules = [part for part in stock.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    noise = base.noise(torch.Generator().manual_seed(SEED), 2)
    found = stock(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=0, output_type="latent").images
    expected = sampler.sample(base, student, base.encode_prompts(PROMPTS), noise, [999], 1.0)
    assert (found - expected).square().mean() < 0.01 * expected.square().mean()  # bfloat16 keeps three digits
