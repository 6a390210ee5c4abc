"""What each process of a launch holds: by hand, by the published figures, and over every launch file."""

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

import runs
import tiny
from mlcm_rl.cost import memory
from mlcm_rl.cost.launches import Launch, Shard, of_this_process, outline, part, read_launch, shard, zero_bytes
from mlcm_rl.models.base import TARGET_TIME_WIDTH
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.recipe import Full, Lora
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.takes import Networks
from mlcm_rl.training import loop
from mlcm_rl.training import processes as distributed
from mlcm_rl.training.launch import LaunchError

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: read_launch(path) for path in sorted((ROOT / "recipes" / "launch").glob("*.yaml"))}
BUCKET = 2_000_000_000  # bytes of 5e8 float32 elements


@pytest.mark.parametrize(("level", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_leaves_a_process_what_the_paper_says_of_seven_and_a_half_billion_weights_on_64(level, gigabytes):
    result = zero_bytes(7_500_000_000, 64, level, parameter=2, gradient=2, optimiser=12)
    assert sum(result) / 1e9 == pytest.approx(gigabytes, abs=0.05)  # Rajbhandari et al. 2020, figure 1


def test_launch_files_say_who_holds_what():
    assert {name: (one.engine, one.processes, one.offload) for name, one in FILES.items()} == {
        "cpu2": ("whole", 2, False),
        "ddp": ("whole", 2, False),
        "fsdp2": ("fsdp2", 2, False),
        "one_gpu": ("whole", 1, False),
        "two_nodes": ("whole", 2, False),
        "zero1": ("zero1", 2, False),
        "zero2": ("zero2", 2, False),
        "zero2_offload": ("zero2", 2, True),
        "zero3": ("zero3", 2, False),
    }
    assert FILES["fsdp2"].blocks == ("BasicTransformerBlock", "ResnetBlock2D", "HunyuanDiTBlock")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("zero2", {"zero_stage": 0}),
        ("zero3", {"offload_optimizer_device": "cpu"}),
        ("zero3", {"offload_param_device": "cpu"}),
        ("fsdp2", {"fsdp_version": 1}),
        ("fsdp2", {"fsdp_reshard_after_forward": False}),
    ],
)
def test_a_launch_that_is_not_predicted_is_refused_in_words(name, change, tmp_path):
    settings = YAML(typ="safe").load((ROOT / "recipes" / "launch" / f"{name}.yaml").read_text())
    inside = next((settings[key] for key in ("deepspeed_config", "fsdp_config") if key in settings), settings)
    inside |= change
    YAML().dump(settings, tmp_path / "launch.yaml")
    with pytest.raises(LaunchError, match=r"launch\.yaml: plan knows"):
        read_launch(tmp_path / "launch.yaml")


def test_a_process_knows_its_own_launch(monkeypatch):
    assert of_this_process() == Launch()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert of_this_process() == Launch("zero2", 1, offload=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "One,Other")
    assert of_this_process() == Launch("fsdp2", 1, blocks=("One", "Other"))


# ---- by hand: a layer of 10 x 20 weights ----


class Layer(nn.Module):
    """A frozen half-precision matrix that may be the teacher's, and a float32 adapter of rank 2."""

    def __init__(self, base: nn.Parameter):
        super().__init__()
        self.base, self.up = base, nn.Linear(2, 20, bias=False)
        self.down = nn.Linear(10, 2, bias=False)


def full_student() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(10, 20, bias=False), nn.Linear(10, 20, bias=False)


def lora_student() -> tuple[nn.Module, nn.Module]:
    teacher = nn.Linear(10, 20, bias=False, dtype=torch.float16).requires_grad_(False)
    return Layer(nn.Parameter(teacher.weight.data, requires_grad=False)), teacher


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (Launch(), Shard(0, 800, 1600, 800, 0, 0)),
        (Launch("whole", 4), Shard(0, 800, 1600, 800, 0, 0)),  # gradients are exchanged where they are
        (Launch("zero1", 4), Shard(0, 800, 600, 800, BUCKET, 0)),  # (8 + 4) x 200 / 4
        (Launch("zero2", 4), Shard(0, 200, 600, 800, BUCKET, 0)),
        (Launch("zero2", 4, offload=True), Shard(0, 0, 0, 800, BUCKET, 200 + 600)),
        (Launch("zero3", 4), Shard(600, 200, 600, 200, BUCKET + 800, 0)),  # the one layer is gathered
        (Launch("fsdp2", 4), Shard(600, 200, 400, 200, 800 + 800, 0)),  # with its gradients
    ],
)
def test_two_hundred_weights_trained_in_full_by_hand(launch, expected):
    assert shard(outline(*full_student(), launch.blocks), launch) == expected


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (Launch(), Shard(0, 240, 480, 240, 0, 0)),  # 2 x 10 + 20 x 2 weights
        (Launch("zero1", 2), Shard(0, 240, 360, 240, BUCKET, 0)),
        (Launch("zero2", 2), Shard(0, 120, 360, 240, BUCKET, 0)),
        # The frozen 400 bytes are the teacher's, whole, and a part of them comes on top: 240 - (400 + 240) / 2.
        (Launch("zero3", 2), Shard(-80, 120, 360, 120, BUCKET + 400, 0)),
        (Launch("fsdp2", 2), Shard(-80, 120, 240, 120, 640 + 240, 0)),
    ],
)
def test_an_adapter_of_sixty_weights_by_hand(launch, expected):
    assert shard(outline(*lora_student(), launch.blocks), launch) == expected


def test_fsdp2_gathers_what_is_in_no_block_and_the_two_largest_blocks():
    student = nn.Sequential(nn.Linear(3, 5, bias=False), *(nn.Conv1d(size, 1, 1, bias=False) for size in (4, 7, 2)))
    found = outline(student, nn.Linear(1, 1), ["Conv1d"])
    assert found.gathered == 2 * 4 * (15 + 7 + 4)  # with their gradients
    assert found.largest == 4 * 15


# ---- over every launch file ----


@pytest.fixture(scope="module")
def teachers(tiny_sdxl, tmp_path_factory) -> dict[str, Path]:
    small = tiny.sd(tmp_path_factory.mktemp("teacher") / "sd")
    return {"sdxl_mlcm": tiny_sdxl, "sd15_mlcm": small, "emoji_mlcm": ROOT / "recipes" / "emoji" / "teacher"}


@pytest.mark.parametrize("adapter", [Full(), pytest.param(Lora(rank=4), marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "name", ["sdxl_mlcm", *(pytest.param(one, marks=pytest.mark.slow) for one in ("sd15_mlcm", "emoji_mlcm"))]
)
def test_a_recipe_is_predicted_under_every_launch_file(name, adapter, teachers, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load(ROOT / "recipes" / f"{name}.yaml", [f"teacher.path={teachers[name]}"], root=ROOT)
    sizes = Sizes(recipe)
    stage = next(one for one in recipe.stages if one.kind == "distill").model_copy(update={"adapter": adapter})
    found = {name: sizes.memory(stage, "cuda", launch) for name, launch in FILES.items()}
    one, ddp = found["one_gpu"], found["ddp"]
    size = sizes.trained(Networks(adapter))
    if stage.condition_on_target:  # a projection of the target time comes on top
        size += TARGET_TIME_WIDTH * sizes.parts["unet"]["conv_in.weight"][0]
    assert (one.gradients, one.optimiser, one.exchange, one.host) == (4 * size, 8 * size, 0, 0)
    assert (ddp.gradients, ddp.optimiser, ddp.parameters) == (one.gradients, one.optimiser, one.parameters)
    assert ddp == found["cpu2"]
    assert found["zero1"].optimiser == found["zero2"].optimiser == found["zero3"].optimiser == part(12 * size, 2)
    assert found["zero2"].gradients == found["zero3"].gradients == found["fsdp2"].gradients == part(4 * size, 2)
    assert found["fsdp2"].optimiser == part(8 * size, 2)
    assert (found["zero2_offload"].optimiser, found["zero2_offload"].host) == (
        0,
        part(4 * size, 2) + part(12 * size, 2),
    )
    assert found["zero3"].parameters == found["fsdp2"].parameters
    assert found["zero3"].parameters < one.parameters
    for memory_of_one in found.values():
        assert 0 < memory_of_one.activations < memory_of_one.total


def test_each_process_takes_its_rows_and_a_batch_that_cannot_be_shared_is_an_error(tiny_sdxl, tmp_path):
    def of(size: int, processes: int) -> memory.Memory:
        stage = runs.distill(batch_size=size)
        return memory.of_stage(
            stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), 0, Full(), "cuda", Launch("whole", processes)
        )

    assert of(8, 2).activations == of(4, 1).activations
    with pytest.raises(ValueError, match="3 samples cannot be shared evenly by 2 processes"):
        of(3, 2)


def test_groups_that_processes_cannot_share_are_an_error_of_the_plan_and_before_the_first_step(
    tiny_sdxl, tmp_path, monkeypatch
):
    stage = runs.tuning("policy", "unused", batch_size=8, num_generations=4)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    message = "2 groups of 4 samples cannot be shared evenly by 4 processes"
    with pytest.raises(ValueError, match=message):
        memory.of_stage(stage, recipe, 0, Lora(rank=2, alpha=2.0), "cuda", Launch("whole", 4))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(ValueError, match=message):
        loop.Runtime(recipe, stage, tmp_path)


def test_a_stage_of_the_teacher_alone_holds_no_student_and_is_as_large_in_every_launch(tiny_sdxl, tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    sizes = Sizes(runs.recipe(tiny_sdxl, tmp_path, [stage]))
    weights = sizes.weights("unet") + sizes.weights("vae")  # the text encoders are gone
    assert sizes.memory(stage, "cuda").parameters == pytest.approx(4 * weights, rel=0.02)
    assert sizes.memory(stage, "cuda", FILES["zero3"]) == sizes.memory(stage, "cuda")


# ---- a teacher without its weights ----


@pytest.mark.parametrize("make", [tiny.sdxl, tiny.sd])
def test_a_teachers_json_files_are_enough(make, tmp_path):
    folder = make(tmp_path / "teacher")
    family, stage = make.__name__, runs.distill()
    recipe = runs.recipe(folder, tmp_path, [stage], family)
    whole = Sizes(recipe)
    expected = whole.memory(stage, "cuda")
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    sizes = Sizes(recipe)
    assert sizes.parts.keys() == whole.parts.keys()
    lora = Networks(Lora(rank=4))
    assert sizes.trained(lora) == whole.trained(lora) < whole.trained(Networks(Full()))
    assert sizes.memory(stage, "cuda").total == pytest.approx(expected.total, rel=0.01)


def test_a_teacher_that_is_not_here_is_an_error_that_says_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="They are enough, a few kB: download them"):
        Sizes(runs.recipe(Path("someone/a-model"), tmp_path, [runs.distill()]))
