"""Estimates are worked out once, never trusted when damaged, and stand in no run's way."""

import json

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.nn import functional as F

import runs
from mlcm_rl import pipeline
from mlcm_rl.cost import flops, memory
from mlcm_rl.cost.gpus import DEVICES
from mlcm_rl.cost.live_bytes import Kernels, Live
from mlcm_rl.cost.shapes import Shapes
from mlcm_rl.pipeline import estimates, planning
from mlcm_rl.pipeline.planning import Sizes, planned_stages
from mlcm_rl.recipe import Recipe
from mlcm_rl.recipe.file import load


@pytest.fixture
def counted(monkeypatch, tmp_path) -> list[str]:
    """What is worked out, in a folder of estimates that is empty at first."""
    monkeypatch.setenv("MLCM_RL_ESTIMATES", str(tmp_path / "estimates"))
    worked_out: list[str] = []
    for name, module, function in (("memory", planning, "of_stage"), ("work", flops, "of_stage")):
        result = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *given, n=name, f=result: worked_out.append(n) or f(*given))
    return worked_out


@pytest.fixture
def recipe(tiny_sdxl, tmp_path) -> Recipe:
    return runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])


def changed(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update=changes)]})


def test_a_plan_works_out_once_what_it_needs_of_a_configuration(recipe, counted):
    first = planned_stages(recipe, "cpu", device=DEVICES["h100"])
    assert sorted(counted) == ["memory", "work"]
    assert planned_stages(recipe, "cpu", device=DEVICES["h100"]) == first
    assert planned_stages(changed(recipe, seed=5), "cpu")[0].memory == first[0].memory
    assert len(counted) == 2
    assert planned_stages(changed(recipe, batch_size=1), "cpu")[0].memory != first[0].memory
    assert planned_stages(recipe, "cuda")
    assert len(counted) == 4


@pytest.mark.parametrize("damage", ["", "[]", '{"estimate": 1}', "smaller", "another"])
def test_a_damaged_estimate_is_made_again(recipe, counted, damage):
    (first,) = planned_stages(recipe, "cpu")
    (path,) = estimates.folder().iterdir()
    saved = json.loads(path.read_text())
    changes = {
        "smaller": saved | {"estimate": saved["estimate"] | {"parameters": 1}},
        "another": saved | {"description": {}},
    }
    path.write_text(json.dumps(changes[damage]) if damage in changes else damage)
    assert planned_stages(recipe, "cpu") == [first]
    assert len(counted) == 2
    assert json.loads(path.read_text()) == saved


def test_a_plan_needs_no_folder_of_estimates_that_can_be_written(recipe, counted, tmp_path):
    (tmp_path / "estimates").write_text("a file")
    assert planned_stages(recipe, "cpu") == planned_stages(recipe, "cpu")
    assert len(counted) == 2


def test_an_estimate_that_fails_is_said_and_stops_neither_plan_nor_run(tiny_sdxl, tmp_path, monkeypatch, capsys):
    def fail(*given):
        raise TypeError("forward() takes [2] arguments\nand more")

    monkeypatch.setattr(Sizes, "memory", fail)
    recipe = runs.whole(tiny_sdxl, tmp_path, num_segments=[1], sample_every=100)
    recipe = recipe.model_copy(update={"stages": recipe.stages[:2]})
    assert [one.unknown for one in planned_stages(recipe, "cpu")] == ["TypeError: forward() takes [2] arguments"] * 2
    done = pipeline.run(recipe)
    message = capsys.readouterr().out
    assert "memory could not be predicted: TypeError: forward() takes [2] arguments\n" in message
    assert "memory measured" in message
    kept = json.loads((done[1].folder / "manifest.json").read_text())["memory"]
    assert kept["predicted"] is None
    assert kept["measured"] is not None


# ---- shapes and kernels ----


def test_attention_through_the_dispatcher_of_diffusers_is_attention(monkeypatch):
    query, key, value = (torch.empty(2, 100, 4, 8, device="meta", requires_grad=True) for _ in range(3))
    with Live() as live, Kernels("cuda", autocast=False):
        out = dispatch_attention_fn(query, key, value)
        assert out.shape == (2, 100, 4, 8)
        out.sum().backward()
    assert live.peak < 4 * 2 * 4 * 100 * 100  # the matrix of scores alone


@pytest.mark.parametrize("masked", [False, True])
def test_attention_takes_its_arguments_by_place_and_by_name(masked):
    query, key, value = (torch.empty(2, 4, 10, 8, device="meta") for _ in range(3))
    mask = torch.empty(10, 10, device="meta") if masked else None
    with Kernels("cuda", autocast=False):
        by_place = F.scaled_dot_product_attention(query, key, value, mask, 0.0)
        by_name = F.scaled_dot_product_attention(value=value, key=key, query=query, attn_mask=mask, dropout_p=0.0)
        mixed = F.scaled_dot_product_attention(query, key=key, value=value, attn_mask=mask, is_causal=False)
    assert by_place.shape == by_name.shape == mixed.shape == query.shape


OPERATIONS = {
    "a product": lambda x: x @ x,
    "a sum with a whole number": lambda x: x.to(torch.int64) + 1,
    "a sum with a fraction": lambda x: x.to(torch.int64) + 1.0,
    "several results": lambda x: torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5)[1],
    "results side by side": lambda x: x.topk(2)[1],
    "other strides": lambda x: x.t() * 2,
    "a view": lambda x: x.t(),
    "a part": lambda x: x[:, 2:4],
    "written to": lambda x: x.clone().fill_(1.0),
    "grown in place": lambda x: torch.empty(0, device="meta").resize_(3),
    "a convolution": lambda x: F.conv2d(x[None, None], torch.empty(3, 1, 3, 3, device="meta")),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_met_before_comes_out_as_without_looking_it_up(name):
    x = torch.empty(8, 8, device="meta")
    plain = OPERATIONS[name](x)
    with Shapes():
        for _ in range(2):
            found = OPERATIONS[name](x)
            assert (found.shape, found.stride(), found.dtype) == (plain.shape, plain.stride(), plain.dtype)
            assert found.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
            assert (found.untyped_storage()._cdata == x.untyped_storage()._cdata) == (
                plain.untyped_storage()._cdata == x.untyped_storage()._cdata
            )


def test_tensors_with_content_are_computed():
    with Shapes():
        assert (torch.ones(2) + torch.ones(2)).tolist() == (torch.ones(2) + torch.ones(2)).tolist() == [2.0, 2.0]
        assert torch.zeros(2).fill_(3.0).tolist() == [3.0, 3.0]


def test_a_step_finds_a_shape_once_however_often_it_comes(monkeypatch):
    """Twenty layers alike take as many look-ups of new shapes as one."""
    from mlcm_rl.cost import shapes

    def found_out(layers: int) -> int:
        monkeypatch.setattr(shapes, "_recipes", {})
        with Live(), torch.device("meta"):
            network = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(layers)))
            network(torch.empty(2, 8)).sum().backward()
        return len(shapes._recipes)

    assert found_out(20) <= found_out(3)


# ---- published teachers ----


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (
            "sdxl_mlcm",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
        ("sd15_mlcm", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
    ],
)
def test_a_published_teacher_is_planned_as_the_recipe_ships_with_its_published_weights(name, weights):
    recipe = load(f"recipes/{name}.yaml")
    sizes = Sizes(recipe)
    assert {part: sizes.weights(part) for part in sizes.parts} == weights
    assert [stage.kind for stage in planned_stages(recipe)] == [stage.kind for stage in recipe.stages]
    assert memory.num_tokens(sizes.folder) == 77
