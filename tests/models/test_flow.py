"""The scheduler's file of a rectified flow: a value is refused by file and key, or its schedule is diffusers'."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from mlcm_rl.models.families.flux import Family
from mlcm_rl.recipe import teacher_check, teacher_files
from mlcm_rl.recipe.schedule_types import SHIFT_OF_TOKENS, FlowScheduler
from tiny_families import CASES

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = EULER | {
    **{"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "time_shift_type": "exponential"},
    **{"base_image_seq_len": 256, "max_image_seq_len": 8192},
}
HEUN = EULER | {"_class_name": "FlowMatchHeunDiscreteScheduler"}
SOLVER = {
    **{"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "flow_shift": 3.0},
    **{"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 1000, 10**30, 0.5, -0.5, 1e9, math.nan, math.inf),
    *("", "linear", "exponential", "flow_prediction", [], [1], {}),
]


def shift_of(scheduler: Any, side: int) -> float:
    """Return the shift for a picture of `side` x `side` tokens."""
    base = object.__new__(Family)
    base.pipeline, base.teacher = SimpleNamespace(scheduler=scheduler), SimpleNamespace(path="teacher")
    base.latent_shape, base.geometry, base.resolution = (6, 2 * side, 2 * side), SimpleNamespace(multiple=2), 16 * side
    return base.shift


def stock_sigmas(scheduler: Any, u: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the noise at the times `u` of a picture of `tokens` tokens, as diffusers has it."""
    config = scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        line = (config[key] for key in (*SHIFT_OF_TOKENS[2:], *SHIFT_OF_TOKENS[:2]))
        mu = calculate_shift(tokens, *line) if config.use_dynamic_shifting else None
        scheduler.set_timesteps(sigmas=u.tolist(), mu=mu)
        return scheduler.sigmas[:-1].double()
    if isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        return scheduler.sigmas.flip(0)[(u * 1000).round().long() - 1].double()
    return config.flow_shift * u / (1 + (config.flow_shift - 1) * u)  # inside its set_timesteps, at its own times


def refused(function: Callable[..., Any], *arguments: Any) -> str:
    """Return why `function` refuses its arguments, by ValueError; empty if it does not."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("content", [EULER, DYNAMIC, HEUN, SOLVER], ids=["euler", "dynamic", "heun", "solver"])
def test_a_value_is_refused_by_file_and_key_or_the_schedule_is_the_stock_one(tmp_path, content):
    path, u = tmp_path / "scheduler" / "scheduler_config.json", torch.tensor([0.001, 0.125, 0.5, 1.0]).double()
    path.parent.mkdir()
    num_passed = 0
    for key, value in [(key, value) for key in FlowScheduler.model_fields | DYNAMIC | SOLVER for value in VALUES]:
        path.write_text(json.dumps(content | {key: value}), encoding="utf-8")
        if lines := refused(teacher_files.read, path, FlowScheduler):
            assert lines.startswith("scheduler/scheduler_config.json: ")
            continue
        num_passed += 1
        scheduler = getattr(diffusers, content["_class_name"]).from_config(json.loads(path.read_text()))
        for side in (2, 64):
            if reason := refused(shift_of, scheduler, side):
                assert f"make a shift of inf for the {side**2} tokens" in reason
                continue
            shift, expected = shift_of(scheduler, side), stock_sigmas(scheduler, u, side**2)
            actual = shift * u / (1 + (shift - 1) * u)
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5, msg=f"{key}: {value!r}")
    assert num_passed > 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_shift": None},
            "base_shift: expected a number, of which use_dynamic_shifting makes the shift, found None",
        ),
        ({"max_shift": None}, "max_shift: expected a number"),
        ({"max_image_seq_len": None}, "max_image_seq_len: expected a number"),
        ({"max_image_seq_len": 256}, "max_image_seq_len: expected more than base_image_seq_len 256, found 256"),
        ({"base_image_seq_len": 9000}, "max_image_seq_len: expected more than base_image_seq_len 9000, found 8192"),
        ({"time_shift_type": "linear"}, "time_shift_type: expected exponential, the shift exp(mu), found linear, the"),
        ({"time_shift_type": "cubic"}, "time_shift_type: expected 'exponential' or 'linear', found 'cubic'"),
        ({"max_shift": 900.0}, "max_shift: expected less than or equal to 7, found 900.0"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "use_dynamic_shifting: expected False in a FlowMatchHeun"),
    ],
)
def test_a_shift_that_no_function_of_tokens_has_is_refused_when_the_folder_is_checked(tmp_path, changes, message):
    folder = CASES["qwen_image"].write(tmp_path / "teacher")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    (line,) = teacher_check.problems(folder, "qwen_image")
    assert line.startswith(f"scheduler/scheduler_config.json: {message}")


def test_keys_of_dynamic_shifting_have_no_effect_without_it(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(EULER | {"base_shift": None, "time_shift_type": "linear", "max_image_seq_len": 256}))
    teacher_files.read(path, FlowScheduler)
    assert shift_of(diffusers.FlowMatchEulerDiscreteScheduler.from_config(path), 64) == 3.0


def test_the_shift_of_a_multistep_solver_is_its_own_key_whatever_else_is_in_the_file():
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(SOLVER | {"shift": 9.0})
    assert shift_of(scheduler, 64) == 3.0


def test_a_shift_that_no_float_holds_is_refused_with_keys_and_tokens():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(DYNAMIC | {"max_image_seq_len": 257})
    with pytest.raises(
        ValueError, match=r"base_image_seq_len, max_image_seq_len: they make a shift of inf for the 4096"
    ):
        shift_of(scheduler, 64)


def test_a_scheduler_that_no_folder_check_has_seen_is_checked_when_it_is_loaded(tmp_path):
    """A hub model's files are not here when the recipe is read."""
    base = CASES["flux"].load(CASES["flux"].write(tmp_path / "teacher"))
    base.pipeline.scheduler = type(base.pipeline.scheduler)(use_dynamic_shifting=True, time_shift_type="linear")
    message = r"teacher .*: scheduler/scheduler_config\.json: time_shift_type: expected exponential"
    with pytest.raises(ValueError, match=message):
        Family(base.teacher, torch.device("cpu"), base.pipeline)
