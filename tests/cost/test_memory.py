"""The memory that is predicted of a stage: by hand where that can be done, else by what must be more than what."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import runs
import tiny
from mlcm_rl.cost import memory, peak
from mlcm_rl.cost.live_bytes import Kernels, Live
from mlcm_rl.models import lpips, published_teachers
from mlcm_rl.models.autoencoder import Autoencoder
from mlcm_rl.pipeline.planning import Sizes, planned_stages
from mlcm_rl.preference import tuning
from mlcm_rl.recipe import Full, Lora, Reward, Teacher, TrainPerceptual
from mlcm_rl.recipe.lpips_layout import new_layout
from mlcm_rl.rewards import build

PUBLISHED = published_teachers.FOLDER


def of(stage, folder, distilled=None, kind="cuda", teacher: Teacher | None = None) -> memory.Memory:
    """The memory of `stage` over the teacher in a folder; its text towers are left out."""
    recipe = runs.recipe(folder, folder, [stage])
    recipe = recipe.model_copy(update={"teacher": teacher or recipe.teacher})
    return memory.of_stage(stage, recipe, 0, distilled or Full(), kind)


# ---- what is alive ----


def test_live_bytes_are_those_of_a_product_and_its_backward_pass_by_hand():
    with Live() as live:
        x = torch.empty(64, 32, device="meta")
        weight = torch.empty(32, 16, device="meta", requires_grad=True)
        assert live.now == 4 * (64 * 32 + 32 * 16)
        hidden = x @ weight
        loss = hidden.square().sum()
        del hidden
        assert live.now == 4 * (64 * 32 + 32 * 16 + 64 * 16 + 1)  # the square keeps what it was of
        loss.backward()
        del loss, x
        assert live.now == 4 * 2 * 32 * 16  # the weight and its gradient


def test_attention_keeps_a_number_a_query_and_no_scores():
    with Live() as live, Kernels("cuda", autocast=False):
        query, key, value = (torch.empty(2, 4, 100, 8, device="meta", requires_grad=True) for _ in range(3))
        before = live.now
        out = F.scaled_dot_product_attention(query, key, value)
        assert live.now - before == 4 * (out.numel() + 2 * 4 * 100)
        out.sum().backward()
        assert live.peak - before < 4 * 2 * 4 * 100 * 100  # the matrix of scores alone


def test_autocast_keeps_half_precision_copies_and_on_a_gpu_norms_in_single():
    def held(kind: str) -> int:
        with Live() as live, Kernels(kind, autocast=True):
            x = torch.empty(1, 32, 8, 8, device="meta", dtype=torch.bfloat16)
            weight = torch.empty(32, 32, 3, 3, device="meta", requires_grad=True)
            before = live.now
            out = F.group_norm(F.conv2d(x, weight, padding=1), 8)
            assert out.dtype == (torch.float32 if kind == "cuda" else torch.bfloat16)
            return live.now - before

    assert held("cuda") - held("cpu") >= 2 * 32 * 8 * 8
    assert held("cpu") >= 2 * 32 * 32 * 9


# ---- a stage's ----


def test_gradients_moments_and_averages_are_counted_by_the_trained_weight(tiny_sdxl):
    full = of(runs.distill(adapter=Full(), target_ema=0.9, target="consistency"), tiny_sdxl)
    lora = of(runs.distill(adapter=Lora(rank=2, alpha=2.0)), tiny_sdxl)
    size = full.gradients // 4
    assert (full.optimiser, full.averages) == (8 * size, 4 * size)
    assert lora.averages == 0
    assert 0 < lora.gradients < full.gradients / 5
    assert lora.parameters - full.parameters == lora.gradients  # an adapter on top: the teacher's own weights are gone
    asked = of(runs.distill(adapter=Full(), source="data", images="unused", target="consistency"), tiny_sdxl)
    assert asked.parameters - full.parameters == 4 * size
    assert full.total == full.parameters + 16 * size + full.activations


@pytest.mark.slow
def test_an_averaged_target_in_bfloat16_has_half_precision_copies_of_its_own(tiny_sdxl):
    settings = {"adapter": Full(), "source": "data", "images": "unused", "target": "consistency", "precision": "bf16"}
    own, averaged = (of(runs.distill(**settings, target_ema=decay), tiny_sdxl) for decay in (0.0, 0.9))
    assert 0 < averaged.activations - own.activations <= 2 * own.gradients // 4


@pytest.mark.parametrize("kind", ["feedback", "dpo", "policy"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_tuning_stage_in_bfloat16_is_predicted_too(kind, checkpointed, tiny_sdxl):
    """Its samples are drawn by the trained weights without gradient, before the pass with gradient."""
    gamma = {"gamma": 1.0} if kind == "policy" else {}
    whole, half = (
        of(runs.tuning(kind, "unused", precision=one, gradient_checkpointing=checkpointed, **gamma), tiny_sdxl)
        for one in ("no", "bf16")
    )
    assert 0 < half.activations < 1.1 * whole.activations  # attention is written out in bfloat16 on a CPU
    assert half.gradients == whole.gradients


def test_checkpointing_and_fewer_steps_with_gradient_take_less(tiny_sdxl):
    def activations(**changes) -> int:
        return of(runs.tuning("feedback", "unused", **changes), tiny_sdxl).activations

    usual = activations(batch_size=8)
    assert activations(batch_size=8, gradient_checkpointing=True) < 0.8 * usual
    assert activations(batch_size=8, num_grad_steps=2) > 1.1 * usual


def test_pictures_scored_under_two_prompts_are_decoded_once(tiny_sdxl, monkeypatch):
    decode, counts = Autoencoder.decode, []

    def counted(self, latents, *rest):
        counts[-1] += 1
        return decode(self, latents, *rest)

    monkeypatch.setattr(Autoencoder, "decode", counted)
    for shape in ("hinge", "mps_hinge"):
        counts.append(0)
        of(runs.tuning("feedback", "unused", shape=shape, threshold=1.0, rewards=["emoji_alignment"]), tiny_sdxl)
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_tiles_take_less_and_a_small_decoder_is_counted_with_its_weights(tiny_sdxl, tmp_path):
    large = Teacher(path=str(tiny_sdxl), family="sdxl", resolution=128)

    def taken(**changes) -> memory.Memory:
        stage = runs.tuning("feedback", "unused", batch_size=1, **changes)
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
        return memory.of_stage(stage, recipe.model_copy(update={"teacher": large}), 0, Full(), "cuda")

    whole, tiles = taken(gradient_checkpointing=True), taken(gradient_checkpointing=True, autoencoder_tiles=32)
    assert tiles.activations < 0.9 * whole.activations
    assert tiles.parameters == whole.parameters
    folder = Path(tiny.small_decoder(tmp_path))
    small = taken(gradient_checkpointing=True, small_decoder=str(folder))
    weights = load_file(next(folder.glob("*.safetensors")))
    assert small.parameters - whole.parameters == 4 * sum(value.numel() for value in weights.values())


def test_a_reward_is_counted_with_its_weights_and_an_absent_one_is_named(tiny_sdxl, monkeypatch, tmp_path):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    stage = runs.tuning("dpo", "unused", rewards=[{"name": "emoji_style"}, {"name": "image_reward"}])
    result = of(stage, tiny_sdxl)
    loaded = build(Reward(name="emoji_style"), "cpu").predictor
    sizes = [value.numel() for value in (*loaded.parameters(), *loaded.buffers())]
    assert result.rewards == pytest.approx(4 * sum(sizes), rel=0.02)
    assert result.uncounted == result.unbuilt == ("image_reward",)
    shipped = of(runs.tuning("feedback", "unused", rewards=[{"name": "scene_match"}]), tiny_sdxl)
    assert (shipped.uncounted, shipped.unbuilt) == (("scene_match",), ())  # its weights are here


def test_what_is_predicted_stands_beside_what_was_measured(tiny_sdxl, monkeypatch):
    predicted = memory.Memory(parameters=600_000, activations=400_000)
    sizes = iter([10_000_000, 12_500_000, 12_500_000])
    monkeypatch.setattr(peak, "_of_process", lambda name: next(sizes))
    meter = peak.begin(torch.device("cpu"), predicted)
    grown = "the process's growth, with what libraries take and the allocator keeps"
    assert str(meter) == f"predicted 1.0 MB of tensors, measured 2.5 MB ({grown})"
    record = meter.record()
    assert (record["measured"], record["predicted"]["total"]) == (2_500_000, 1_000_000)


@pytest.mark.skipif(not peak.STATUS.is_file(), reason="this system does not say how large a process is")
def test_what_an_earlier_stage_left_is_not_measured_as_the_next_one_s():
    left = []

    def stage(size: int) -> int:
        meter = peak.begin(torch.device("cpu"), None)
        parts = [
            torch.ones(size // 4 // 8192) for _ in range(8192)
        ]  # small: an allocator keeps them when they are free
        left.append(torch.ones(100))  # above them
        del parts
        return meter.measured()

    first, second, third = stage(400 * 2**20), stage(400 * 2**20), stage(4 * 2**20)
    assert first > 300 * 2**20
    assert second > 300 * 2**20
    assert third < 100 * 2**20


def test_a_plan_has_the_memory_of_what_is_to_do_where_it_is_asked_for(tiny_sdxl, tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    (without,), (given,) = planned_stages(recipe), planned_stages(recipe, "cpu")
    assert without.memory is None
    alone = of(stage, tiny_sdxl)
    headers = (path.stat().st_size for path in tiny_sdxl.glob("text_encoder*/*.safetensors"))
    encoders = sum(headers)  # gone before the first sample, whose pass takes more
    assert given.memory.total == alone.total == alone.parameters + max(encoders, alone.activations)
    assert given.memory.gradients == 0


def test_text_encoders_that_leave_count_for_what_they_are_more_than_what_comes_after(tiny_sdxl):
    def found(leaving: int, staying: int = 0, **changes) -> memory.Memory:
        stage = runs.distill(adapter=Full(), target_ema=0.9, target="consistency", **changes)
        recipe = runs.recipe(tiny_sdxl, tiny_sdxl, [stage])
        return memory.of_stage(stage, recipe, staying, Full(), "cuda", leaving=leaving)

    without = found(0)
    size = 2 * without.total
    assert found(1000).total == without.total
    assert found(size).total == without.parameters + without.averages + size  # the average is there before them
    assert found(0, staying=1000).total == without.total + 1000


def test_text_encoders_are_there_while_pictures_are_encoded(tiny_sdxl, monkeypatch):
    """By hand, with an autoencoder whose encoder takes a gigabyte a picture."""
    stage = runs.distill(source="data", images="unused", target="consistency", batch_size=2)
    gigabyte, encode = 2**30, Autoencoder.encode

    def large(self, images):
        taken = images.new_empty(len(images), gigabyte // 4)
        assert taken.is_meta
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", large)
    recipe = runs.recipe(tiny_sdxl, tiny_sdxl, [stage])
    without, with_encoders = (
        memory.of_stage(stage, recipe, 0, Full(), "cuda", leaving=leaving) for leaving in (0, gigabyte)
    )
    more = with_encoders.total - without.total
    # the moments come after the pictures: only what exceeds them is more
    assert more == pytest.approx(gigabyte - without.optimiser - without.gradients, abs=without.gradients)


def test_a_plan_counts_text_encoders_that_stay_for_many_texts(tiny_sdxl, tmp_path, monkeypatch):
    stage = runs.distill(source="data", images=runs.write_images(tmp_path), target="consistency", num_segments=[2])
    sizes = Sizes(runs.recipe(tiny_sdxl, tmp_path, [stage]))
    leaving = sizes.memory(stage, "cuda").total
    monkeypatch.setattr("mlcm_rl.recipe.distill.MAX_ENCODED_AHEAD", 3)  # captions, one fewer than there are
    weights = sum(map(sizes.weights, ("text_encoder", "text_encoder_2")))
    assert sizes.memory(stage, "cuda").total == leaving + 4 * weights


def test_a_long_stage_of_preference_learning_keeps_the_text_encoders_and_encodes_as_it_goes(tiny_sdxl, tmp_path):
    """Ahead, its prompts would fill the memory of every process; nothing is asked of the base here, which is None."""
    short, long = (
        runs.tuning("feedback", runs.write_prompts(tmp_path), num_steps=count, batch_size=8) for count in (1024, 1025)
    )
    assert short.encodes_ahead
    assert not long.encodes_ahead
    tuning.encode_ahead(long, runs.recipe(tiny_sdxl, tmp_path, [long]), None, lambda step: [])


def test_scores_of_attention_are_not_held_between_steps_either(tiny_sdxl, tmp_path):
    """At 128 x 128 latents the scores of one sample's heads would be as large as this alone."""
    stage = runs.trajectories("unused", batch_size=1)
    large = Teacher(path=str(tiny_sdxl), family="sdxl", resolution=256, guidance_scale=1.0)
    heads, queries = 28 // 4, (128 // 2) ** 2
    assert of(stage, tiny_sdxl, teacher=large).activations < 4 * heads * queries**2


# ---- published shapes ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "weights"),
    [("sd", "stable-diffusion-v1-5", 859_520_964), ("sdxl", "stable-diffusion-xl-base-1.0", 2_567_463_684)],
)
def test_published_models_are_as_large_as_published_and_checkpointing_makes_room(family, name, weights):
    folder = PUBLISHED / name
    teacher = Teacher(path=str(folder), family=family, dtype="bfloat16")
    lora = {"adapter": Lora(rank=64, alpha=64.0), "precision": "bf16", "batch_size": 4}
    plain, checkpointed = (
        of(runs.distill(gradient_checkpointing=flag, **lora), folder, teacher=teacher) for flag in (False, True)
    )
    full = of(runs.distill(adapter=Full(), batch_size=1, gradient_checkpointing=True), folder, teacher=teacher)
    assert full.gradients == 4 * weights
    assert checkpointed.activations < 0.5 * plain.activations
    assert checkpointed.total < 40 * 2**30  # what the issue wants of SDXL with a LoRA at batch 4


@pytest.mark.parametrize("convolution", [F.conv2d, F.conv3d])
def test_convolutions_of_pictures_and_of_videos_are_lowered_as_autocast_lowers_them(convolution):
    sides = [3] * (2 if convolution is F.conv2d else 3)
    images, weight, bias = (torch.empty(*shape, device="meta") for shape in ((1, 4, *sides), (2, 4, *sides), (2,)))
    with Kernels("cuda", autocast=True):
        assert convolution(images.bfloat16(), weight, bias).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(*(torch.zeros(one.shape) for one in (images, weight, bias))).dtype == torch.bfloat16


def test_terms_add_their_own_networks_and_no_second_set_of_the_teachers_weights(tiny_sdxl):
    """Of a fake score its matrices, their gradients while it is updated, and two moments each."""
    settings = {"method": "inter_segment", "num_segments": [1], "adapter": Lora(rank=2, alpha=2.0)}
    without = of(runs.distill(**settings), tiny_sdxl)
    matched = of(runs.distill(**settings, matching={"fake": {"rank": 2, "alpha": 2.0}}), tiny_sdxl)
    assert matched.parameters - without.parameters == without.gradients  # an adapter like the student's
    assert matched.optimiser == 2 * without.optimiser
    assert matched.gradients == without.gradients
    half = runs.distill(**settings, adversarial={"width": 4}, precision="bf16", gradient_checkpointing=True)
    teacher = runs.recipe(tiny_sdxl, tiny_sdxl, [half]).teacher.model_copy(update={"dtype": "bfloat16"})
    assert of(half, tiny_sdxl, teacher=teacher).activations > 0  # the teacher's blocks are recomputed without autocast
    opposed = of(runs.distill(**settings, adversarial={"width": 4}), tiny_sdxl)
    size = opposed.parameters - without.parameters
    assert 0 < size < without.gradients
    assert opposed.optimiser - without.optimiser == 2 * size
    assert opposed.activations > without.activations  # the teacher's, through which the student's gradient comes
    pairs = of(runs.distill(**settings, adversarial={"width": 4, "sees_start": True}), tiny_sdxl)
    assert size < pairs.parameters - without.parameters < 2 * size  # the first matrix of each head is twice as wide


@pytest.mark.parametrize("distilled", [Lora(rank=2, alpha=2.0), Full()], ids=["lora", "full"])
def test_matching_in_feedback_keeps_the_teacher_and_adds_an_adapter(tiny_sdxl, tmp_path, distilled):
    """Over a LoRA student the teacher's weights are there already; a student of its own has one more set beside it."""
    prompts, fake = runs.write_prompts(tmp_path), {"fake": {"rank": 2, "alpha": 2.0}}
    without = of(runs.tuning("feedback", prompts), tiny_sdxl, distilled)
    matched = of(runs.tuning("feedback", prompts, matching=fake), tiny_sdxl, distilled)
    teacher = 0 if isinstance(distilled, Lora) else of(runs.distill(adapter=Full()), tiny_sdxl).gradients
    assert matched.parameters - without.parameters == without.gradients + teacher  # an adapter like the preference's
    assert matched.optimiser == 2 * without.optimiser
    assert (matched.gradients, matched.averages) == (without.gradients, without.averages)
    assert matched.activations >= without.activations
    sizes = Sizes(runs.recipe(tiny_sdxl, tmp_path, [runs.distill(adapter=distilled)]))
    plain, with_fake = (sizes.disk(runs.tuning("feedback", prompts, **changes)) for changes in ({}, {"matching": fake}))
    assert with_fake - plain == 2 * 3 * without.gradients  # two checkpoints of the fake score and its moments


def test_a_distance_by_features_keeps_the_teacher_and_one_by_lpips_its_network(tiny_sdxl, tmp_path):
    settings = {"num_segments": [1], "adapter": Full()}
    plain = of(runs.distill(**settings), tiny_sdxl)
    by_blocks = of(runs.distill(**settings, distance="features"), tiny_sdxl)
    assert by_blocks.parameters - plain.parameters == plain.gradients  # a denoiser beside the student's
    with pytest.raises(ValueError, match="feature_blocks: 99, and the denoiser of"):
        of(runs.distill(**settings, distance="features", feature_blocks=[0, 99]), tiny_sdxl)
    network = lpips.new(new_layout(4, [4, 6], [1, 1]), seed=0)
    lpips.save(network, tmp_path / "lpips.safetensors")
    by_lpips = of(runs.distill(**settings, distance="lpips", lpips=str(tmp_path)), tiny_sdxl)
    size = sum(4 * value.numel() for value in network.parameters())
    assert by_lpips.parameters - plain.parameters == size
    assert by_lpips.gradients == plain.gradients
    trains = of(TrainPerceptual(images="images", num_steps=2, widths=[4, 6], depths=[1, 1]), tiny_sdxl)
    assert trains.gradients == size
    assert trains.optimiser == 2 * size


def test_a_surrogate_adds_its_heads_and_takes_the_gradient_out_of_the_decoder(tiny_sdxl):
    settings = {"batch_size": 4, "guard": {"rewards": ["colourfulness"], "num_prompts": 2}}
    direct = of(runs.tuning("feedback", "prompts.txt", **settings), tiny_sdxl)
    surrogate = {"num_generations": 2, "width": 4, "head_start": 0}
    learned = of(runs.tuning("feedback", "prompts.txt", surrogate=surrogate, **settings), tiny_sdxl)
    size = learned.parameters - direct.parameters
    assert size > 0
    assert learned.optimiser - direct.optimiser == 2 * size
    assert learned.gradients == direct.gradients
    assert learned.activations != direct.activations
