"""The file of a latent LPIPS is checked, tensor by tensor, when the recipe is read."""

import json
import struct
from pathlib import Path

import pytest

from mlcm_rl.recipe.lpips_layout import FILE, new_layout
from mlcm_rl.recipe.tree import key_text

SETTING = ("precision: no", "distance: lpips\n    lpips: {}\n    precision: no")


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of zeros, without torch."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name], end = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}, end + size
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def problems(broken, name: str):
    """Those of a recipe that has one problem elsewhere too, so that it is never read without any."""
    return broken((SETTING[0], SETTING[1].format(name)), ("seed: 7", "seed: 7\nruns: ''"))


def sizes_of_teacher(root: Path) -> None:
    for part, config in (
        ("unet", {"in_channels": 4, "block_out_channels": [8, 8]}),
        ("vae", {"block_out_channels": [8]}),
    ):
        (root / "teacher" / part).mkdir(exist_ok=True)
        (root / "teacher" / part / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["weights/lpips.safetensors", "weights"])
def test_a_file_and_a_folder_that_fit_are_taken(broken, root, name):
    write_weights(root / "weights" / FILE, new_layout(4, [3, 5], [1, 1]).shapes())
    assert not [one for one in problems(broken, name) if one.key[-1] == "lpips"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lin0.model.1.weight": [1, 4, 1, 1]}, "lin0.model.1.weight: expected [1, 3, 1, 1], found [1, 4, 1, 1]"),
        (
            {"scaling_layer.shift": [1]},
            "scaling_layer.shift: expected none, found [1]; `python -m mlcm_rl.models.lpips",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(broken, root, change, text):
    write_weights(root / "weights" / FILE, new_layout(4, [3, 5], [1, 1]).shapes() | change)
    (problem,) = [one for one in problems(broken, "weights") if one.key[-1] == "lpips"]
    assert key_text(problem.key) == "stages[1].lpips"
    assert text in problem.text


def test_other_files_are_refused_and_told_how_to_convert(broken, root):
    (root / "weights.pth").write_bytes(b"anything")
    (problem,) = [one for one in problems(broken, "weights.pth") if one.key[-1] == "lpips"]
    assert "other formats can run code and are not read; `python -m mlcm_rl.models.lpips" in problem.text
    (root / "weights.safetensors").write_bytes(b"anything")
    (problem,) = [one for one in problems(broken, "weights.safetensors") if one.key[-1] == "lpips"]
    assert "is damaged, or no safetensors file" in problem.text
    (problem,) = [one for one in problems(broken, "nowhere.safetensors") if one.key[-1] == "lpips"]
    assert "no such file: nowhere.safetensors" in problem.text


def test_a_network_for_other_latents_is_refused(broken, root):
    sizes_of_teacher(root)
    write_weights(root / "weights" / FILE, new_layout(16, [3, 5], [1, 1]).shapes())
    texts = [one.text for one in problems(broken, "weights") if one.key[-1] == "lpips"]
    assert len(texts) == 1
    assert "compares latents of 16 channels, and the teacher's have 4" in texts[0]


def test_without_a_file_an_earlier_stage_must_train_it(broken):
    (problem,) = [one for one in broken(("precision: no", "distance: log_lpips")) if one.key[-1] == "distance"]
    assert "needs lpips: (a file or a folder), or an earlier train_perceptual stage" in problem.text
