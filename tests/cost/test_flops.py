"""Floating-point operations by hand, and how long a device is at them."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import runs
import tiny
from mlcm_rl.cost import flops, memory
from mlcm_rl.cost.evaluations import network_evaluations
from mlcm_rl.cost.flops import Operations, Work, count_operations, of_stage, seconds, this_device
from mlcm_rl.cost.gpus import CPU_SHARE, DEVICES, GPU_SHARE, Device
from mlcm_rl.cost.launches import Launch
from mlcm_rl.equations.segments import time_grid
from mlcm_rl.models import sampler, teachers
from mlcm_rl.pipeline.planning import planned_stages
from mlcm_rl.recipe import Evaluate, Full, Lora, Teacher, TrainPerceptual
from mlcm_rl.training import machine

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


def test_the_memory_of_this_device_is_what_its_container_may_use(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{3 * 2**26}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(flops, "_rate", lambda *_: 1.0)
    assert this_device(torch.device("cpu")).memory == 3 * 2**26


def test_a_pass_of_the_emoji_teacher_is_half_a_billion_operations(tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    recipe = runs.recipe(EMOJI, tmp_path, [stage])
    first, later = of_stage(stage, recipe, Full())
    assert first.count + later.count == network_evaluations(stage, recipe)
    assert first.each.total == pytest.approx(0.466e9, rel=0.01)


def test_training_takes_three_times_a_pass_less_for_an_adapter_and_more_with_checkpointing(tiny_sdxl, tmp_path):
    def trained(**changes) -> float:
        stage = runs.distill(**changes)
        work = of_stage(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), Full())
        result = {one.kind: one.each.total for one in work}
        return result["trained"] / result["student"]

    full = trained(adapter=Full(), target="consistency")
    assert full == pytest.approx(3, rel=0.05)  # nothing asks for the gradient of what comes in
    assert 2 < trained(adapter=Lora(rank=2), target="consistency") < full
    assert trained(adapter=Full(), target="consistency", gradient_checkpointing=True) > full + 0.5


@pytest.mark.parametrize("kind", ["feedback", "dpo", "policy"])
def test_the_passes_of_a_tuning_stage_are_its_evaluations_and_what_its_rewards_see(kind, tiny_sdxl, tmp_path):
    stage = runs.tuning(kind, "unused", num_steps=3, batch_size=4, sampling_steps=2)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    work = of_stage(stage, recipe, Full())
    evaluations = {name: sum(one.count for one in work if one.kind == name) for name in ("student", "trained")}
    seen = {one.kind: one.count for one in work if one.kind not in evaluations}  # by each of the rewards alike
    trained = {"feedback": 3 * 4, "dpo": 3 * 4 * 2 * 2, "policy": 3 * 4}
    pictures = {"feedback": {"graded": 12}, "dpo": {"scored": 12 * 4}, "policy": {"scored": 12}}
    assert evaluations["trained"] == trained[kind]
    assert sum(evaluations.values()) == network_evaluations(stage, recipe)
    assert seen == pictures[kind] | {"watched": (3 + 1) * 4}  # a look after each step, and one at the reference


def test_what_is_scored_is_decoded_by_the_small_decoder_and_what_is_watched_by_the_whole_one(tiny_sdxl, tmp_path):
    small, decoding = tiny.small_decoder(tmp_path / "decoder"), []
    surrogate = {"num_generations": 2, "width": 4, "head_start": 0}
    for settings in ({}, {"small_decoder": small}):
        stage = runs.tuning("feedback", "unused", num_steps=3, batch_size=4, surrogate=surrogate, **settings)
        work = of_stage(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), Full())
        decoding.append({one.kind: one.each for one in reversed(work) if one.kind in ("scored", "watched")})
    assert decoding[0]["watched"] == decoding[1]["watched"]
    assert decoding[0]["scored"] != decoding[1]["scored"]


def test_pictures_scored_under_two_prompts_are_decoded_once(tiny_sdxl, tmp_path):
    settings = {"shape": "mps_hinge", "threshold": 1.0, "rewards": ["emoji_alignment"]}
    stage = runs.tuning("feedback", "unused", num_steps=3, batch_size=4, **settings)
    work = of_stage(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), Full())
    assert [one.count for one in work if one.kind == "graded"] == [12, 24]


def test_keys_and_values_of_the_prompt_count_once_for_a_sampler(tiny_sdxl, tmp_path):
    """By hand: two products for each cross-attention; and as a whole, where the teacher's own sampler is counted."""
    stage = runs.trajectories("unused", solver_steps=8)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    first, later = of_stage(stage, recipe, Full())
    base = teachers.skeleton(recipe.teacher)
    tokens = memory.num_tokens(tiny_sdxl)
    layers = [one for name, one in base.denoiser.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    by_hand = sum(2 * tokens * one.in_features * one.out_features for one in layers)
    assert layers
    assert first.each - later.each == Operations(0, by_hand)

    noise, prompt = torch.empty(1, *base.latent_shape, device="meta"), base.empty_conditioning(1, tokens)
    sampled = count_operations(
        lambda: sampler.sample_teacher(base, prompt, prompt, noise, time_grid(8)[:-1], recipe.teacher.guidance_scale)
    )
    counted = sum(one.count * one.each.total for one in (first, later))
    assert counted == pytest.approx(sampled.total * stage.num_stored)


@pytest.mark.parametrize(
    ("stage", "with_keys"),
    [
        (runs.distill(source="online", prompts="unused", target="consistency"), None),  # rows have their own steps
        (runs.distill(method="inter_segment", num_segments=[1], num_teacher_steps=3), 2),
        (runs.tuning("feedback", "unused", num_steps=3, sampling_steps=4), None),  # a part of it has gradient
    ],
    ids=["online", "inter_segment", "feedback"],
)
def test_which_passes_of_a_step_take_the_keys_of_others(stage, with_keys, tmp_path):
    recipe = runs.recipe(tmp_path, tmp_path, [stage])
    sampled = next(one for one in stage.passes(recipe) if one.evaluations > 1)
    assert sampled.num_with_keys == with_keys
    assert sampled.num_without_keys == (0 if with_keys is None else 4)


def test_rows_of_an_evaluation_take_the_keys_of_their_first_step(tmp_path):
    stage = Evaluate(prompts="unused", sampling_steps=[1, 2], teacher_steps=[4], gammas=[0.0], num_prompts=1)
    recipe = runs.recipe(tmp_path, tmp_path, [runs.trajectories("unused"), runs.distill(), stage])
    rows = [(one.role, one.evaluations, one.num_without_keys) for one in stage.passes(recipe)]
    assert rows == [
        ("teacher", 8, 6),
        ("teacher", 1, 0),
        ("teacher", 2, 0),  # one step with guidance
        ("teacher", 2, 1),  # two without
        ("student", 1, 0),
        ("student", 2, 1),
    ]


def test_autocast_decides_the_precision_of_a_step_and_weights_that_of_the_rest(tiny_sdxl, tmp_path):
    def precisions(teacher_dtype: str, **changes) -> dict[str, str]:
        stage = runs.distill(target="consistency", **changes)
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
        teacher = Teacher(path=str(tiny_sdxl), family="sdxl", dtype=teacher_dtype)
        recipe = recipe.model_copy(update={"teacher": teacher})
        return {one.kind: one.precision for one in of_stage(stage, recipe, Full())}

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


def test_rewards_compute_in_their_own_precision_and_the_guard_draws_in_the_stages(tiny_sdxl, tmp_path):
    rewards = [{"name": "emoji_style"}]
    for kind, pictures in (("policy", "scored"), ("feedback", "graded")):
        stage = runs.tuning(kind, runs.write_prompts(tmp_path), precision="bf16", rewards=rewards)
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
        work = of_stage(stage, recipe, Lora(rank=2))
        found = [(one.kind, one.precision) for one in work]
        assert {(pictures, "bfloat16"), (pictures, "float32")} <= set(found)
        assert {precision for one, precision in found if one == "student"} == {"bfloat16"}
        assert {precision for one, precision in found if one == "watched"} == {"float32"}
        (reward,) = (one for one in work if (one.kind, one.precision) == (pictures, "float32"))
        assert reward.each.total > 0
        unwatched = stage.model_copy(update={"guard": stage.guard.model_copy(update={"every": 1000})})
        drawn, fewer = (
            sum(one.count for one in of_stage(each, recipe, Lora(rank=2)) if one.kind == "student")
            for each in (stage, unwatched)
        )
        assert drawn - fewer == 4 * 2  # one look more, of 4 prompts in 2 steps


def test_terms_take_their_passes_and_the_fake_score_five_updates(tiny_sdxl, tmp_path):
    settings = {"method": "inter_segment", "num_segments": [1], "adapter": {"kind": "lora", "rank": 2, "alpha": 2.0}}
    stage = runs.distill(**settings, matching={"fake": {"rank": 2, "alpha": 2.0}}, adversarial={"width": 4})
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    work = {one.kind: one for one in flops.of_stage(stage, recipe, stage.adapter)}
    samples = stage.num_steps * stage.batch_size
    counts = {kind: one.count for kind, one in work.items()}
    assert counts["fake"] == counts["heads"] == counts["trained"] == samples
    assert counts["trained fake"] == 5 * samples
    assert counts["trained heads"] == 2 * samples
    trained, fake = (work[kind].each.total for kind in ("trained", "trained fake"))
    assert fake == pytest.approx(trained, rel=1e-3)  # an adapter like the student's
    forward = work["teacher"].each.total
    assert forward < work["trained heads"].each.total < work["heads"].each.total  # whose gradient comes through it
    pairs = runs.distill(num_segments=[1], adversarial={"width": 4, "sees_start": True})
    plain = runs.distill(num_segments=[1], adversarial={"width": 4})
    of_pairs, of_ends = (
        {one.kind: one for one in flops.of_stage(one, runs.recipe(tiny_sdxl, tmp_path, [one]), one.adapter)}
        for one in (pairs, plain)
    )
    starts = of_pairs["teacher"].count - (of_ends["teacher"].count if "teacher" in of_ends else 0)
    assert starts == 2 * pairs.num_steps * pairs.batch_size
    assert of_pairs["heads"].each.total > of_ends["heads"].each.total  # twice the channels


def test_a_distance_takes_its_own_passes_and_no_evaluations_of_the_denoiser(tiny_sdxl, tmp_path):
    plain, by_blocks = runs.distill(num_segments=[1]), runs.distill(num_segments=[1], distance="features")
    trains = TrainPerceptual(images="images", num_steps=2, batch_size=4, widths=[4, 6], depths=[1, 1])
    by_lpips = runs.distill(num_segments=[1], distance="log_lpips")
    work = {}
    for name, stages in {"plain": [plain], "features": [by_blocks], "lpips": [trains, by_lpips]}.items():
        recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
        work[name] = {one.kind: one for one in flops.of_stage(stages[-1], recipe, Lora())}
        assert network_evaluations(stages[-1], recipe) == network_evaluations(plain, recipe)
    assert set(work["features"]) - set(work["plain"]) == {"features"}
    assert work["features"]["features"].count == work["lpips"]["lpips"].count == work["plain"]["trained"].count
    forward = work["features"]["features"].each.total / 3  # two passes, and the gradient by the first's picture
    assert 0 < forward < work["plain"]["trained"].each.total / 2  # of the first blocks alone
    recipe = runs.recipe(tiny_sdxl, tmp_path, [trains])
    (own,) = [one for one in flops.of_stage(trains, recipe, Lora()) if one.kind == "lpips"]
    assert own.count == 2 * 2 * 4  # distances, steps, pairs
