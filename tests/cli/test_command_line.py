"""The `mlcm` command: what it prints, and with which code it ends. The pipeline behind it is a stand-in here."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

import mlcm_rl
from mlcm_rl import __version__
from mlcm_rl.cli import reward_commands
from mlcm_rl.cli.app import app
from mlcm_rl.cost.gpus import DEVICES
from mlcm_rl.cost.launches import Launch
from mlcm_rl.cost.memory import Memory
from mlcm_rl.pipeline.planning import PlannedStage
from mlcm_rl.recipe import Recipe
from mlcm_rl.recipe.schema import json_schema

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "numpy")


class RunError(Exception):
    exit_code = 1


class BadArgument(RunError):
    exit_code = 2


@pytest.fixture
def pipeline(monkeypatch) -> ModuleType:
    return stand_in(monkeypatch, "pipeline")


@pytest.fixture
def finished_runs(monkeypatch) -> ModuleType:
    module = stand_in(monkeypatch, "pipeline.finished_runs")
    module.sample_inputs = SimpleNamespace(of_command=lambda *given: given)
    return module


def stand_in(monkeypatch, name: str) -> ModuleType:
    """Stands for mlcm_rl.`name`; a test gives it the functions that it calls."""
    module = ModuleType(f"mlcm_rl.{name}")
    module.RunError = RunError
    monkeypatch.setitem(sys.modules, module.__name__, module)
    place, _, last = module.__name__.rpartition(".")
    monkeypatch.setattr(sys.modules.get(place, mlcm_rl), last, module, raising=False)
    return module


@pytest.fixture
def mlcm(root, monkeypatch):
    """Runs the command in the folder of the good recipe."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def raises(error: BaseException):
    def function(*_):
        raise error

    return function


def test_validate_says_ok_or_all_errors_for_every_recipe(mlcm, root):
    text = (root / "good.yaml").read_text("utf-8")
    (root / "bad.yaml").write_text(text.replace("seed: 7", "sed: 7").replace("judge: judge", "judge: juge"), "utf-8")
    result = mlcm("validate", "good.yaml", "bad.yaml", "none.yaml", "god.yaml", "emoji_dem")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        "ok  good.yaml",
        "bad bad.yaml: 1 error",
        "bad.yaml:3:1: sed: unknown key; did you mean seed?",
        "bad none.yaml: 1 error",
        "none.yaml: no such file",
        "bad god.yaml: 1 error",
        "god.yaml: no such file; did you mean good.yaml?",
        "bad emoji_dem: 1 error",
        "emoji_dem: no such file; did you mean emoji_demo?",
    ]


def test_validate_puts_settings_over_each_recipe(mlcm, root):
    assert mlcm("validate", "good.yaml", "seed=3", "stages.distill.num_steps=40").exit_code == 0
    result = mlcm("validate", "good.yaml", "sede=3")
    assert result.exit_code == 2
    assert "good.yaml with sede=3: sede: unknown key; did you mean seed?" in result.stdout
    alone = mlcm("validate", "seed=3")
    assert alone.exit_code == 2
    assert "name a recipe's YAML file before the settings" in " ".join(alone.stderr.replace("│", " ").split())
    Path("a=b.yaml").write_text(Path("good.yaml").read_text())
    assert mlcm("validate", "a=b.yaml").exit_code == 0


def test_an_empty_prompt_file_and_a_tracker_that_is_not_installed_are_bad_recipes(mlcm, root, monkeypatch):
    (root / "data" / "prompts.txt").write_text("\n \n")
    result = mlcm("run", "good.yaml")
    assert result.exit_code == 2
    assert "stages[0].prompts: data/prompts.txt holds no prompt: write one a line" in result.stderr
    (root / "data" / "prompts.txt").write_text("a cat")
    monkeypatch.setattr("mlcm_rl.recipe.experiment.find_spec", lambda name: None if name == "wandb" else name)
    for command in ("run", "validate"):
        result = mlcm(command, "good.yaml", "trackers=[tensorboard, wandb]")
        assert result.exit_code == 2
        message = "trackers[1]: wandb is not installed: pip install 'mlcm-rl[wandb]', or take it out of trackers"
        assert message in result.stdout + result.stderr
    assert not Path("runs").exists()


def test_validate_of_good_recipes_ends_with_0_and_long_paths_are_not_wrapped(mlcm, root):
    long = Path("recipes" * 12) / "good.yaml"
    long.parent.mkdir()
    long.write_bytes((root / "good.yaml").read_bytes())
    result = mlcm("validate", "good.yaml", str(long))
    assert (result.exit_code, result.stdout) == (0, f"ok  good.yaml\nok  {long}\n")


def test_run_gives_the_pipeline_the_recipe_with_its_overrides(mlcm, pipeline):
    given: list[Recipe] = []
    pipeline.run = lambda recipe, skip_damaged: given.append(recipe) or ["a stage", "another"]
    result = mlcm("run", "good.yaml", "seed=3", "stages[distill].num_steps=5")
    assert (result.exit_code, result.stdout) == (
        0,
        "done  2 stages in runs/good\nreport  runs/good/02-evaluate/report.html\n",
    )
    assert (given[0].seed, given[0].stages[1].num_steps) == (3, 5)


def test_a_bad_recipe_or_override_ends_with_2_before_anything_runs(mlcm, pipeline):
    pipeline.run = pipeline.plan = raises(AssertionError("ran"))
    for command in ("run", "plan"):
        result = mlcm(command, "good.yaml", "seed=x")
        assert result.exit_code == 2
        assert "good.yaml with seed=x: seed: expected a whole number of at least 0, found the text 'x'" in result.stderr


def test_a_failed_run_ends_with_1_and_its_message_without_a_traceback(mlcm, pipeline):
    pipeline.run = raises(RunError("stage 1 (distill): the loss is not finite [step 12]"))
    result = mlcm("run", "good.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "failed  stage 1 (distill): the loss is not finite [step 12]\n"


def test_a_bad_argument_ends_with_2_and_its_message(mlcm, finished_runs):
    finished_runs.export = raises(BadArgument("OUT: x is there already"))
    result = mlcm("export", ".", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "bad  OUT: x is there already\n"


def test_another_exception_is_a_bug_and_is_not_hidden(mlcm, pipeline):
    pipeline.run = raises(ZeroDivisionError("bug"))
    result = mlcm("run", "good.yaml")
    assert (result.exit_code, type(result.exception)) == (1, ZeroDivisionError)


def test_ctrl_c_ends_with_130_and_says_that_the_same_command_goes_on(mlcm, pipeline):
    pipeline.run = raises(KeyboardInterrupt())
    result = mlcm("run", "good.yaml")
    assert result.exit_code == 130
    assert result.stderr == "\nInterrupted. The same command takes the run up where it was saved.\n"


STAGES = Path("runs/stages")
PLANNED = [
    PlannedStage("trajectories", "0a", STAGES / "trajectories-0a", True, 6144, 9_000_000),
    PlannedStage(
        "distill",
        "1b",
        STAGES / "distill-1b",
        False,
        12_000,
        1_500_000,
        Memory(2_000_000_000, 500, 1000, activations=10**9, uncounted=("ocr", "taste"), unbuilt=("ocr",)),
    ),
    PlannedStage(
        "evaluate", "2c", STAGES / "evaluate-2c", False, 400, 999, Memory(10**9, uncounted=("ocr",), unbuilt=("ocr",))
    ),
]
LAUNCHES = Path(__file__).resolve().parents[2] / "recipes" / "launch"


def test_plan_lists_stages_and_sums_what_is_still_to_do(mlcm, pipeline):
    pipeline.plan = lambda recipe, memory, launch, device: PLANNED
    result = mlcm("plan", "good.yaml")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert rows[1:5] == [
        ["trajectories-0a", "done", "6,144", "9.0", "MB"],
        ["distill-1b", "to", "do", "12,000", "1.5", "MB", "3.0", "GB"],
        ["evaluate-2c", "to", "do", "400", "999", "B", "1.0", "GB"],
        ["still", "to", "do", "12,400", "1.5", "MB", "3.0", "GB"],
    ]
    assert rows[7:9] == [
        ["distill", "2.0", "GB", "500", "B", "1.0", "kB", "1.0", "GB"],
        ["evaluate", "1.0", "GB"],
    ]
    assert result.stdout.count("not counted") == 2
    assert "not counted for distill, evaluate: ocr (their weights are not here" in result.stdout
    assert "not counted for distill: taste (what they compute depends on pictures" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:9])) <= 80


def test_a_plan_names_every_folder_whole_in_eighty_columns(mlcm, pipeline, monkeypatch):
    name = "trajectories-e63ef49364024b27-milestones"
    pipeline.plan = lambda *arguments: [replace(PLANNED[1], folder=STAGES / name, seconds=90.0)]
    monkeypatch.setattr("mlcm_rl.cli.recipes.console", Console(width=80, height=40, highlight=False))
    assert name in mlcm("plan", "good.yaml", "--device", "h100").stdout


def test_plan_warns_of_a_disk_that_the_stages_to_do_do_not_fit(mlcm, pipeline, monkeypatch):
    pipeline.plan = lambda *arguments: [replace(PLANNED[1], disk_bytes=274 * 10**9), PLANNED[0]]
    monkeypatch.setattr("mlcm_rl.cli.plan_table.free_space", lambda folder: 50 * 10**9)
    warning = "too large  the stages to do write 274 GB and the disk of runs has 50.0 GB free: make room"
    assert warning in " ".join(mlcm("plan", "good.yaml").stdout.split("\n"))
    monkeypatch.setattr("mlcm_rl.cli.plan_table.free_space", lambda folder: 274 * 10**9)
    assert "too large" not in mlcm("plan", "good.yaml").stdout


def test_plan_under_a_launch_on_a_device_tells_time_and_what_does_not_fit_in_a_hundred_columns(
    mlcm, pipeline, monkeypatch
):
    gigabyte = 10**9
    held = Memory(*([24 * gigabyte] * 5), exchange=2 * gigabyte, rewards=999_000_000, host=24 * gigabyte)
    stages = [replace(PLANNED[0], kind="train_teacher", folder=STAGES / "train_teacher-0123456789abcdef", done=False)]
    stages = [replace(stages[0], memory=held, operations=3.6e18, seconds=9000.0), replace(PLANNED[2], seconds=90.0)]
    given = []
    pipeline.plan = lambda *arguments: given.append(arguments[2:]) or stages
    monkeypatch.setattr("mlcm_rl.cli.recipes.console", Console(width=100, height=40, highlight=False))
    launch = ("--launch", str(LAUNCHES / "zero2_offload.yaml"))
    result = mlcm("plan", "good.yaml", *launch, "--device", "RTX 4090")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert given == [(Launch("zero2", 2, offload=True), DEVICES["rtx4090"])]
    assert lines[0].split() == ["stage", "evaluations", "disk", "memory", "time"]
    assert [line.split()[-2:] for line in lines[1:4]] == [["2.5", "h"], ["1.5", "min"], ["2.5", "h"]]
    assert lines[5].split()[-3:] == ["exchange", "rewards", "host"]
    assert max(map(len, lines[:8])) <= 100
    assert "too large  train_teacher needs 123 GB and RTX 4090 has 24.0 GB: smaller micro-batches" in result.stdout
    assert "Memory is that of each of 2 processes (ZeRO-2)." in result.stdout
    assert "Time is at 40% of the matrix rate of RTX 4090: an assumption, no GPU was measured." in result.stdout
    assert "What stands under host is in the memory of the CPU" in result.stdout


def test_a_machines_rank_without_a_launch_is_refused(mlcm, pipeline):
    refused = mlcm("run", "good.yaml", "--machine-rank", "1")
    assert refused.exit_code == 2
    assert "go with --launch" in " ".join(refused.stderr.replace("│", " ").split())


def test_plan_refuses_a_device_and_a_launch_that_it_does_not_know(mlcm, pipeline, root):
    unknown = mlcm("plan", "good.yaml", "--device", "abacus")
    assert unknown.exit_code == 2
    assert "no device 'abacus': h100, h200" in unknown.stderr
    (root / "launch.yaml").write_text("distributed_type: TPU\n", encoding="utf-8")
    refused = mlcm("plan", "good.yaml", "--launch", "launch.yaml")
    assert refused.exit_code == 2
    assert "distributed_type: expected one of" in " ".join(refused.stderr.replace("│", " ").split())


def test_plan_as_json_has_every_figure_in_bytes_and_seconds(mlcm, pipeline):
    pipeline.plan = lambda recipe, memory, launch, device: [PLANNED[0], replace(PLANNED[1], seconds=7.5)]
    launch = ("--launch", str(LAUNCHES / "fsdp2.yaml"))
    result = json.loads(mlcm("plan", "good.yaml", "--json", *launch, "--device", "h100").stdout)
    done, distill = result["stages"]
    assert (done["memory"], done["folder"], done["disk_bytes"]) == (None, "runs/stages/trajectories-0a", 9_000_000)
    assert (distill["memory"]["activations"], distill["seconds"]) == (1_000_000_000, 7.5)
    assert {"exchange", "host", "gradients"} < distill["memory"].keys()
    assert (result["launch"]["engine"], result["launch"]["processes"]) == ("fsdp2", 2)
    assert (result["device"]["name"], result["device"]["share"]) == ("H100 SXM", 0.4)
    assert json.loads(mlcm("plan", "good.yaml", "--json").stdout)["device"] is None


def test_sample_evaluate_and_export_hand_their_arguments_on(mlcm, finished_runs):
    Path("runs/good").mkdir(parents=True)
    calls: list[tuple] = []
    finished_runs.sample = lambda *given: calls.append(given) or [Path("out/0.png"), Path("out/1.png")]
    finished_runs.evaluate = lambda *given: calls.append(given) or Path("stages/evaluate-1")
    finished_runs.export = lambda *given: calls.append(given) or Path("out")
    Path("out/unet").mkdir(parents=True)
    Path("out/unet/config.json").write_text("{}", encoding="utf-8")
    sampled = mlcm("sample", "runs/good", "--prompt", "a cat", "--prompt", "猫", "--out", "out", "--gamma", "0.5")
    evaluated = mlcm("evaluate", "runs/good", "--steps", "2", "--steps", "4")
    finished_runs.push = lambda *given: calls.append(given) or "address"
    exported = mlcm("export", "runs/good", "out")
    sent = mlcm(
        *(
            "export",
            "runs/good",
            "out",
            "--format",
            "comfyui",
            "--merge",
            "--dtype",
            "fp16",
            "--push",
            "me/it",
            "--public",
        )
    )
    assert (sampled.stdout, evaluated.stdout) == ("out/0.png\nout/1.png\n", "stages/evaluate-1/report.html\n")
    assert exported.stdout == "out\n  unet/config.json  2 B\n"
    assert sent.stdout == "out\n  unet/config.json  2 B\naddress\n"
    run, inputs = Path("runs/good"), (None, None, None, [], [], [], False, None, None)
    assert calls == [
        (run, ["a cat", "猫"], [4], 0, 0.5, Path("out"), 16, 1, None, inputs, None, None),
        (run, None, [2, 4], None, None),
        (run, Path("out"), ["diffusers"], None, False, None),
        (run, Path("out"), ["comfyui"], "fp16", True, "me/it"),
        (Path("out"), "me/it", True),
    ]


def test_sample_takes_a_prompt_file_after_the_prompts(mlcm, finished_runs):
    Path("runs/good").mkdir(parents=True)
    Path("more.txt").write_text("a dog\n", encoding="utf-8")
    calls: list[tuple] = []
    finished_runs.sample = lambda *given: calls.append(given) or []
    finished_runs.prompts_of = lambda file: file.read_text(encoding="utf-8").splitlines()
    assert mlcm("sample", "runs/good", "--prompt", "a cat", "--prompts", "more.txt", "--out", "out").exit_code == 0
    mlcm("sample", "runs/good", "--prompts", "more.txt", "--out", "out", "--steps", "2", "--steps", "8")
    assert [(call[1], call[2]) for call in calls] == [(["a cat", "a dog"], [4]), (["a dog"], [2, 8])]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sample", "runs/god", "--prompt", "x", "--out", "y"], "no folder runs/god: the nearest are runs/good"),
        (["export", "good", "out"], "no folder good: the nearest are runs/good"),
        (
            ["sample", "runs/lora", "--prompt", "x", "--out", "y"],
            "runs/lora is a student of no run: name the folder of its",
        ),
        (["sample", "runs/good", "--prompt", "x", "--out", "y", "--grid", "lcm"], "--grid goes with --teacher"),
        (["evaluate", "runs/lora"], "runs/lora is a file: `mlcm sample` draws with it; a recipe of one stage `start`"),
        (["evaluate", "runs/good", "--steps", "9"], "Invalid value for '--steps'"),
        (["sample", "runs/good", "--out", "y"], "name what to draw: --prompt TEXT, or --prompts FILE"),
        (["sample", "runs/good", "--prompt", "x", "--out", "y", "--gamma", "2"], "Invalid value for '--gamma'"),
        (["export", "runs/good", "out", "--format", "a1111"], "Invalid value for '--format'"),
        (["export", "runs/good", "out", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["export", "runs/good", "out", "--public"], "--public means nothing without --push NAME/MODEL"),
        (["export", "runs/good", "out", "--format", "all", "--push", "me/it"], "--push takes one --format"),
        (["walk"], "No such command 'walk'"),
    ],
)
def test_a_bad_argument_ends_with_2_and_says_which(mlcm, arguments, text):
    Path("runs/good").mkdir(parents=True)
    Path("runs/lora").touch()
    result = mlcm(*arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


def test_schema_prints_or_writes_the_schema(mlcm, root):
    assert json.loads(mlcm("schema").stdout) == json_schema()
    assert mlcm("schema", "--out", "schema.json").exit_code == 0
    assert json.loads((root / "schema.json").read_text("utf-8")) == json_schema()


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("nodir/x.json", "nodir/x.json could not be written: no such file or directory"),
        ("good.yaml/x.json", "good.yaml/x.json could not be written: not a directory"),
        ("folder", "'folder' is a directory"),
    ],
)
def test_a_schema_that_cannot_be_written_is_an_error_of_the_argument_and_leaves_nothing(mlcm, root, out, told):
    (root / "folder").mkdir()
    before = sorted(root.rglob("*"))
    result = mlcm("schema", "--out", out)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--help"], ["pairs", "--help"], ["validate", "good.yaml"]])
def test_help_and_validate_start_without_torch(root, arguments):
    program = f"""
import sys
from dataclasses import replace
from mlcm_rl.__main__ import main
sys.argv = ["mlcm", *{arguments}]
try:
    main()
except SystemExit as end:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    sys.exit(f"imported {{loaded}}" if loaded else end.code)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=_environment(), capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert "mlcm" in found.stdout or found.stdout == "ok  good.yaml\n"


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(mlcm_rl.__file__).parents[1]), "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}


def test_help_breaks_no_line_that_the_terminal_would_not(mlcm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    groups = ((), app), (("rewards",), reward_commands.app)
    commands = [
        ((*group, one.name or one.callback.__name__), one) for group, of in groups for one in of.registered_commands
    ]
    assert len(commands) > 10
    for name, command in commands:
        printed = [" ".join(line.split()) for line in mlcm(*name, "--help").output.splitlines()]
        for paragraph in inspect.getdoc(command.callback).split("\n\n"):
            assert " ".join(paragraph.split()) in printed, name


def test_the_version_is_printed(mlcm):
    assert mlcm("--version").output == f"mlcm_rl {__version__}\n"


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_wait_asleep_unless_the_user_says_otherwise(own):
    """The variable is set before anything can import torch, which reads it once; a launch hands it on."""
    program = "import sys, mlcm_rl.__main__, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = _environment() | ({} if own is None else {"OMP_WAIT_POLICY": own})
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [own or "passive", "False"]
