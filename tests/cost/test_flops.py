"""Floating-point operations by hand, and how long a device is at them."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import runs
from mlcm_rl.cost.evaluations import network_evaluations, passes_of
from mlcm_rl.cost.flops import Operations, Work, count_operations, of_stage, seconds, this_device
from mlcm_rl.cost.gpus import CPU_SHARE, DEVICES, GPU_SHARE, Device
from mlcm_rl.cost.launches import Launch
from mlcm_rl.pipeline.planning import planned_stages
from mlcm_rl.recipe import Full, Lora, Teacher

EMOJI = Path(__file__).resolve().parents[2] / "recipes" / "emoji" / "teacher"


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


def test_a_product_counts_two_a_term_and_twice_as_much_in_its_backward_pass():
    one, other = empty(64, 32), empty(32, 16)
    assert count_operations(lambda: one @ other) == Operations(0, 2 * 64 * 32 * 16)
    assert count_operations(lambda: (one @ other).sum().backward()) == Operations(0, 3 * 2 * 64 * 32 * 16)


def test_convolutions_are_counted_apart():
    image, kernel = empty(2, 3, 8, 8), empty(5, 3, 3, 3)
    forward = 2 * 2 * 5 * 3 * 9 * 8 * 8
    assert count_operations(lambda: F.conv2d(image, kernel, padding=1)) == Operations(forward, 0)
    assert count_operations(lambda: F.conv2d(image, kernel, padding=1).sum().backward()) == Operations(3 * forward, 0)


def test_attention_is_counted_as_its_two_products():
    query, key, value = (empty(2, 4, 100, 8).detach() for _ in range(3))
    attended = count_operations(lambda: F.scaled_dot_product_attention(query, key, value))
    assert attended == Operations(0, 2 * 2 * (2 * 4 * 100 * 100 * 8))


def test_a_device_is_as_long_as_its_rates_say_and_convolutions_of_float32_are_tf32():
    device = Device("made up", "cuda", 10**9, {"float32": 1.0, "tf32": 4.0, "bfloat16": 8.0, "float16": 8.0})
    work = Operations(convolutions=8e12, products=2e12)
    assert work.seconds(device, "float32") == pytest.approx((8 / 4 + 2) / GPU_SHARE)
    assert work.seconds(device, "bfloat16") == pytest.approx((10 / 8) / GPU_SHARE)
    entries = [Work("teacher", 3, work, "bfloat16"), Work("student", 1, work, "float32")]
    alone = seconds(entries, device, Launch())
    assert alone == pytest.approx((3 * 10 / 8 + 4) / GPU_SHARE)
    assert seconds(entries, device, Launch("whole", 2)) == alone / 2


def test_processes_share_a_cpu():
    cpu = Device("made up", "cpu", 10**9, dict.fromkeys(("float32", "tf32", "bfloat16", "float16"), 1.0))
    work = [Work("teacher", 1, Operations(0, 1e12), "float32")]
    assert seconds(work, cpu, Launch("whole", 2)) == seconds(work, cpu, Launch()) == pytest.approx(1 / CPU_SHARE)


def test_every_named_device_has_every_rate_and_this_one_is_measured():
    for device in [*DEVICES.values(), this_device(torch.device("cpu"))]:
        assert device.rates.keys() == {"float32", "tf32", "bfloat16", "float16"}
        assert min(device.rates.values()) > 0
        assert device.memory > 10**8


def test_a_pass_of_the_emoji_teacher_is_half_a_billion_operations(tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    recipe = runs.recipe(EMOJI, tmp_path, [stage])
    (teacher,) = of_stage(stage, recipe, passes_of(stage, recipe), Full())
    assert teacher.count == network_evaluations(stage, recipe)
    assert teacher.each.total == pytest.approx(0.466e9, rel=0.01)


def test_training_takes_three_times_a_pass_less_for_an_adapter_and_more_with_checkpointing(tiny_sdxl, tmp_path):
    def trained(**changes) -> float:
        stage = runs.distill(**changes)
        work = of_stage(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), passes_of(stage, recipe), Full())
        result = {one.kind: one.each.total for one in work}
        return result["trained"] / result["student"]

    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.distill()])
    full = trained(adapter=Full(), target="consistency")
    assert full == pytest.approx(3, rel=0.05)  # nothing asks for the gradient of what comes in
    assert 2 < trained(adapter=Lora(rank=2), target="consistency") < full
    assert trained(adapter=Full(), target="consistency", gradient_checkpointing=True) > full + 0.5


@pytest.mark.parametrize("kind", ["feedback", "dpo", "policy"])
def test_the_passes_of_a_tuning_stage_are_its_evaluations_and_what_its_rewards_see(kind, tiny_sdxl, tmp_path):
    stage = runs.tuning(kind, "unused", num_steps=3, batch_size=4, sampling_steps=2)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    found = passes_of(stage, recipe)
    trained = {"feedback": 3 * 4, "dpo": 3 * 4 * 2 * 2, "policy": 3 * 4}
    pictures = {"feedback": (0, 12), "dpo": (12 * stage.num_generations if kind == "dpo" else 0, 0), "policy": (12, 0)}
    assert (found.trained, (found.scored, found.graded)) == (trained[kind], pictures[kind])
    assert found.watched == (3 + 1) * 4  # a look after each step, and one at the reference
    assert found.student + found.trained == network_evaluations(stage, recipe)
    kinds = {one.kind for one in of_stage(stage, recipe, found, Full())}
    assert kinds == {"student", "trained", "watched", "graded" if kind == "feedback" else "scored"}


def test_autocast_decides_the_precision_of_a_step_and_weights_that_of_the_rest(tiny_sdxl, tmp_path):
    def precisions(teacher_dtype: str, **changes) -> dict[str, str]:
        stage = runs.distill(target="consistency", **changes)
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
        teacher = Teacher(path=str(tiny_sdxl), family="sdxl", dtype=teacher_dtype)
        recipe = recipe.model_copy(update={"teacher": teacher})
        return {one.kind: one.precision for one in of_stage(stage, recipe, passes_of(stage, recipe), Full())}

    assert precisions("float16", precision="bf16") == {"student": "bfloat16", "trained": "bfloat16"}
    assert precisions("float16", adapter=Full()) == {"student": "float32", "trained": "float32"}
    assert precisions("float16", adapter=Lora(rank=2)) == {"student": "float16", "trained": "float16"}


def test_a_plan_tells_time_where_a_device_is_named(tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path)), runs.distill()])
    without, message = planned_stages(recipe), planned_stages(recipe, device=DEVICES["h100"])
    assert [one.seconds for one in without] == [None, None]
    assert all(one.seconds > 0 and one.operations > 0 for one in message)
    halved = planned_stages(recipe, launch=Launch("whole", 2), device=DEVICES["h100"])
    assert [one.seconds * 2 for one in halved] == pytest.approx([one.seconds for one in message])


def test_rewards_compute_in_their_own_precision_and_the_guard_draws_outside_autocast(tiny_sdxl, tmp_path):
    rewards = [{"name": "emoji_style"}]
    for kind, pictures in (("policy", "scored"), ("feedback", "graded")):
        stage = runs.tuning(kind, runs.write_prompts(tmp_path), precision="bf16", rewards=rewards)
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
        work = of_stage(stage, recipe, passes_of(stage, recipe), Lora(rank=2))
        found = [(one.kind, one.precision) for one in work]
        assert {("student", "bfloat16"), ("student", "float32"), (pictures, "bfloat16"), (pictures, "float32")} <= set(
            found
        )
        assert {precision for one, precision in found if one == "watched"} == {"float32"}
        (reward,) = (one for one in work if (one.kind, one.precision) == (pictures, "float32"))
        assert reward.each.total > 0
        outside = sum(one.count for one in work if (one.kind, one.precision) == ("student", "float32"))
        assert outside == (2 + 1) * 4 * 2  # looks, prompts, steps
