"""The reward contract: how a model is found, what it must declare, what of its answers is refused."""

import math
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

import reward_models
from mlcm_rl.recipe import reward_package
from mlcm_rl.rewards import RewardError, find, finding, score

GOOD = "class Good:\n    differentiable, needs_prompt, languages = False, True, ('en',)\n"
FOLDER = Path(reward_models.__file__).parent


@pytest.fixture
def extra_files(tmp_path, monkeypatch):
    """A function that puts a file beside those of reward_models, for one test."""
    monkeypatch.setattr(reward_models, "__path__", [*reward_models.__path__, str(tmp_path)])

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"reward_models.{name}", raising=False)
        return name

    return write


@pytest.fixture
def registered(monkeypatch):
    """A function that registers entry points, as other distributions do."""

    def register(**points):
        entries = [EntryPoint(name, value, reward_package.ENTRY_POINTS) for name, value in points.items()]

        for module in (finding, reward_package):
            monkeypatch.setattr(module, "entry_points", lambda group: EntryPoints(entries))

    return register


def model(answer):
    class Planted:
        differentiable, needs_prompt, languages = False, False, ()

        def __call__(self, images, prompts):
            return answer

    return Planted()


@pytest.mark.parametrize("name", reward_package.names())
def test_every_file_keeps_the_contract_and_has_a_card(name):
    assert find(name).__name__.lower() == name.replace("_", "")
    card = (FOLDER / f"{name}.md").read_text(encoding="utf-8").lower()
    for part in ("source", "licence of the code", "licence of the weights", "input", "range", "hacked by"):
        assert part in card, part


def test_a_file_is_imported_only_when_it_is_named(extra_files):
    extra_files("broken", "raise ImportError('an optional dependency')")
    assert "broken" in reward_package.names()
    assert find("colourfulness").__name__ == "Colourfulness"
    with pytest.raises(ImportError, match="an optional dependency"):
        find("broken")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(LookupError, match=r"no reward model 'colorfulness'; the nearest names are colourfulness$"):
        find("colorfulness")
    with pytest.raises(LookupError, match=r"the nearest names are .*brightness.*colourfulness.*sharpness"):
        find("qqq")


def test_an_entry_point_is_found(registered):
    registered(other="reward_models.colourfulness:Colourfulness")
    assert find("other") is find("colourfulness")
    assert {"colourfulness", "other"} <= set(reward_package.names())


def test_a_name_that_a_file_and_an_entry_point_claim_is_refused(registered):
    registered(colourfulness="reward_models.colourfulness:Colourfulness")
    with pytest.raises(LookupError, match=r"claimed twice, by reward_models/colourfulness.py and by the entry point"):
        find("colourfulness")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "must define one public class, defines none"),
        (GOOD + "class Another(Good): pass\n", "defines Good, Another"),
        ("from torch.nn import Linear\n", "defines none"),
        ("class Good:\n    differentiable, needs_prompt = False, True\n", "Good.languages must be a tuple, is None"),
        (
            "class Good:\n    differentiable, needs_prompt, languages = 1, True, ()\n",
            "differentiable must be a bool, is 1",
        ),
        (
            "class Good:\n    differentiable, needs_prompt, languages = True, True, ()\n",
            "Good needs a prompt, so its languages must name at least one",
        ),
        (GOOD + "    weights = ('a file',)\n", "Good.weights must be a tuple of mlcm_rl.rewards.Weights"),
    ],
)
def test_a_file_that_does_not_keep_the_contract_is_refused(extra_files, source, message):
    name = extra_files(f"odd{abs(hash(source))}", source)
    with pytest.raises(TypeError, match=f"{name}.py: .*{message}"):
        find(name)


def test_private_classes_are_the_files_own_business(extra_files):
    assert find(extra_files("layered", "class _Block: pass\n" + GOOD)).__name__ == "Good"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, 1), r"must return shape \(2,\), returned \(2, 1\)"),
        (torch.zeros(2, dtype=torch.float64), "must return a float32 tensor.*float64"),
        ([0.0, 0.0], "must return a float32 tensor, returned list"),
        (torch.tensor([0.0, math.nan]), "returned nan for prompt 'b'"),
        (torch.tensor([math.inf, 0.0]), "returned inf for prompt 'a'"),
    ],
)
def test_a_bad_answer_is_refused_by_name(answer, message):
    with pytest.raises(RewardError, match=f"^reward planted: {message}"):
        score(model(answer), "planted", torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_a_reward_that_raises_is_named_and_its_own_error_kept():
    def broken(images, prompts):
        raise KeyError("logits")

    with pytest.raises(RewardError, match=r"^reward planted failed: KeyError: 'logits'") as caught:
        score(broken, "planted", torch.zeros(1, 3, 4, 4), ["a"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 4), (3, 3, 4, 4)])
def test_images_that_do_not_fit_are_refused_before_the_model_is_asked(shape):
    with pytest.raises(ValueError, match="reward planted: images must be"):
        score(model(None), "planted", torch.zeros(shape), ["a", "b"])


def test_a_good_answer_is_passed_on():
    answer = torch.tensor([1.0, 2.0])
    assert score(model(answer), "planted", torch.zeros(2, 3, 4, 4), ["a", "b"]) is answer


def test_a_reward_computes_in_its_own_precision_under_autocast_too():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).half()

    def product(images, prompts):
        rows = images.half().mean((2, 3))
        return torch.cat([rows, rows @ weight], dim=1).float().sum(1)  # autocast to bfloat16 refuses to join float16

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = score(product, "product", images, ["", ""])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(product, "product", images, ["", ""]), expected)
