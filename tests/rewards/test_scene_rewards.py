"""`scene_match` and `scene_count`: the sum over arrangements by hand, real scenes, and prompts that are in no file."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlcm_rl import rewards
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.data.scenes import BACKGROUNDS, STYLES, Reading, answers, read_code
from mlcm_rl.rewards.check import check
from mlcm_rl.rewards.scenes import Requests
from reward_models import scene_match
from reward_models._scene_reader import log_match

SCENES = Path(__file__).parents[2] / "recipes" / "scenes"
CONCEPTS = ["1F43C", "1F34E"]
PANDA, APPLE = CONCEPTS
CODES = [
    f"single {PANDA} 1 - -",
    f"single {APPLE} 1 noto pink",
    f"count {PANDA} 2 - blue",
    f"count {APPLE} 3 fluent -",
    f"count {PANDA} 4 - -",
    f"beside {PANDA} {APPLE} 2 twemoji -",
    f"above {APPLE} {PANDA} 2 - grey",
]


@pytest.mark.parametrize("code", CODES)
def test_the_probability_is_the_sum_over_all_readings_that_answer_the_request(code):
    """Every reading of four cells, with what `answers` says of it: the judge's own definition."""
    generator = torch.Generator().manual_seed(0)
    kinds, styles, backgrounds = (
        torch.randn(shape, generator=generator).mul(2).log_softmax(-1) for shape in ((4, 4), (4, 3), (7,))
    )
    kind_of, style_of = kinds.exp().tolist(), styles.exp().tolist()
    seen = [(PANDA, 0), (APPLE, 1), (None, 2), ("unknown", 3)]
    options = []  # of each cell: what is read there, and its probability
    for cell in range(4):
        objects = [
            ((concept, style), kind_of[cell][k] * style_of[cell][s])
            for concept, k in seen
            if concept is not None
            for s, style in enumerate(STYLES)
        ]
        options.append([(None, kind_of[cell][2]), *objects])
    request, total = read_code(code), 0.0
    for place, background in enumerate(BACKGROUNDS):
        for cells in itertools.product(*options):
            reading = Reading(tuple(content for content, _ in cells), background)
            if answers(request, reading)["all"]:
                total += backgrounds[place].exp().item() * np.prod([share for _, share in cells])
    ours = log_match(kinds[None], styles[None], backgrounds[None], [request], CONCEPTS)
    assert ours.exp().item() == pytest.approx(total, rel=1e-4)


def test_arrangements_are_all_that_answer_a_request():
    for code in CODES:
        request = read_code(code)
        fitting = {
            cells
            for cells in itertools.product([None, *CONCEPTS], repeat=4)
            if answers(request, Reading(tuple(c and (c, request.style or "noto") for c in cells), request.background))[
                "all"
            ]
        }
        assert set(request.arrangements) == fitting
        assert len(request.arrangements) == len(fitting)


# ---- on real pictures ----


@pytest.fixture(scope="module")
def scenes(request) -> tuple[torch.Tensor, list[str]]:
    """The first test prompts and a real scene of each, (N, 3, 128, 128), painted by the recipe's own program."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "path", [str(SCENES / "build"), *sys.path])
        from drawings import load_drawings
        from scene_judge import paint_all
        from scenes import Object, Scene
    prompts = read_prompts(SCENES / "prompts" / "test.jsonl")[:24]
    painted = []
    for prompt in prompts:
        asked = read_code(prompt.concept)
        cells = asked.arrangements[len(painted) % len(asked.arrangements)]
        objects = tuple(Object(c, asked.style or "noto", i) for i, c in enumerate(cells) if c is not None)
        painted.append(Scene(asked.relation, objects, asked.background or "green"))
    return paint_all(load_drawings(), painted), [prompt.prompt for prompt in prompts]


def built(name: str, **settings) -> rewards.RewardModel:
    return rewards.find(name)("cpu", torch.float32, **settings)


def test_a_scene_matches_its_own_prompt_and_no_other(scenes):
    images, prompts = scenes
    reward = built("scene_match")
    own, other = (reward(images, texts) for texts in (prompts, prompts[1:] + prompts[:1]))
    assert (own > -6).all()
    assert (other < -6).all()


def test_cells_may_be_exchanged_where_the_prompt_leaves_them_open_and_only_there(scenes):
    images, prompts = scenes
    reward, turned = built("scene_match"), images.roll(64, dims=3)  # left and right halves change places
    own, after = reward(images, prompts), reward(turned, prompts)
    beside = torch.tensor(
        [
            read_code(p.concept).relation == "beside"
            for p in read_prompts(SCENES / "prompts" / "test.jsonl")[: len(prompts)]
        ]
    )
    assert beside.any()
    assert (own - after)[beside].min() > 5
    assert (own - after)[~beside].abs().max() < 2


def test_objects_are_counted(scenes):
    images, prompts = scenes
    counter = built("scene_count")
    assert counter.requests.of(prompts[0]).count == 1
    assert torch.equal(counter(images, prompts), torch.zeros(len(prompts)))
    asked = torch.tensor([counter.requests.of(prompt).count for prompt in prompts])
    blank = torch.ones_like(images) * images[:, :, :1, :1]
    assert torch.equal(counter(blank, prompts), -asked.float())
    assert not counter(images.requires_grad_(), prompts).requires_grad
    images.requires_grad_(False)


@pytest.mark.parametrize("name", ["scene_match", "scene_count"])
def test_they_pass_the_checks_of_every_reward(name, scenes):
    images, prompts = scenes
    results = check(built(name), name, images[:6], prompts[1:7])
    assert [one.name for one in results if not one.passed] == []


def test_their_gradient_leads_to_what_is_asked(scenes):
    """A few steps up from an empty canvas; the score of the whole rises."""
    prompts = scenes[1]
    reward, blank = built("scene_match"), torch.full((2, 3, 128, 128), 0.8).requires_grad_()
    before = reward(blank, prompts[:2])
    (gradient,) = torch.autograd.grad(before.sum(), blank)
    after = reward(blank.detach() + 0.05 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True), prompts[:2])
    assert (after > before).all()


# ---- prompts and files ----


@pytest.mark.parametrize("name", ["scene_match", "scene_count"])
def test_a_prompt_in_no_file_is_refused(name, tmp_path):
    reward = built(name)
    reward.refuse_prompt(read_prompts(SCENES / "prompts" / "train.jsonl")[0].prompt, 1.0)
    with pytest.raises(ValueError, match=r"asks for is in no file of .*name the files"):
        reward.refuse_prompt("a panda on the moon", 1.0)
    with pytest.raises(ValueError, match="in no file"):
        reward(torch.rand(1, 3, 128, 128), ["a panda on the moon"])


def write(path: Path, *lines: tuple[str, str]) -> Path:
    text = "\n".join(json.dumps({"prompt": prompt, "concept": code}) for prompt, code in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_prompt_files_are_read_from_a_setting(tmp_path):
    path = write(tmp_path / "own.jsonl", ("a panda", CODES[0]))
    for place in (path, tmp_path):
        assert Requests(str(place)).of("a panda") == read_code(CODES[0])
    write(tmp_path / "two.jsonl", ("a panda", CODES[2]))
    with pytest.raises(ValueError, match=r"two\.jsonl:1: 'a panda' asks for something else"):
        Requests(str(tmp_path))
    write(tmp_path / "two.jsonl", ("two", "two pandas"))
    with pytest.raises(ValueError, match=r"two\.jsonl:1: 'two pandas' is not a request's code"):
        Requests(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no prompt file of scenes"):
        Requests(str(tmp_path / "none"))


def test_a_concept_that_the_network_does_not_know_is_refused(tmp_path):
    path = write(tmp_path / "own.jsonl", ("a globe", "single 1F30D 1 - -"))
    with pytest.raises(ValueError, match="does not know the concept 1F30D"):
        built("scene_match", prompts=str(path)).refuse_prompt("a globe", 1.0)


def test_it_shares_no_weights_with_the_judge():
    ours, judges = load_file(scene_match.SHIPPED), load_file(SCENES / "judge" / "judge.safetensors")
    assert scene_match.SHIPPED.stat().st_size < 1_000_000
    for name, value in ours.items():
        for other, theirs in judges.items():
            assert value.shape != theirs.shape or not torch.equal(value, theirs) or value.unique().numel() == 1, (
                name,
                other,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scene_match_in_half_precision_reads_the_same_and_an_empty_batch_has_no_scores(scenes, dtype):
    images, prompts = scenes
    half = rewards.find("scene_match")("cpu", dtype)
    assert torch.allclose(half(images, prompts), built("scene_match")(images, prompts), atol=0.5)
    assert half(images[:0], []).shape == (0,)
