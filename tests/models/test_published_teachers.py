"""The published configurations that come with the package: complete, and of the published sizes."""

import json
from collections import Counter
from math import prod

import pytest

from mlcm_rl.models import files, published_teachers
from mlcm_rl.models.teachers import skeleton
from mlcm_rl.recipe import Teacher

# Family, parameters of each network, blocks that an engine gathers one by one, and the conditioning of a prompt.
PUBLISHED = {
    "flux.1-dev": (
        "flux",
        {
            **{"transformer": 11_901_408_320, "vae": 83_819_683},
            **{"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
        },
        {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38},
        {"context": (512, 4096), "pooled": (768,)},
    ),
    "flux.2-klein-base-4b": (
        "flux2_klein",
        {
            "transformer": 3_875_544_576,
            "vae": 84_046_115 + 2 * 128 + 1,  # with the statistics of its latents
            "text_encoder": 4_022_468_096,
        },
        {"Flux2TransformerBlock": 5, "Flux2SingleTransformerBlock": 20},
        {"context": (512, 7680)},
    ),
    "z-image": (
        "z_image",
        {"transformer": 6_154_908_736, "vae": 83_819_683, "text_encoder": 4_022_468_096},
        {"ZImageTransformerBlock": 34},
        {"context": (512, 2560), "lengths": ()},
    ),
    "qwen-image": (
        "qwen_image",
        {"transformer": 20_430_401_088, "vae": 126_892_531, "text_encoder": 8_292_166_656},
        {"QwenImageTransformerBlock": 60},
        {"context": (512, 3584), "lengths": ()},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_sizes(name):
    family, parameters, blocks, conditioning = PUBLISHED[name]
    teacher = Teacher(path=str(published_teachers.FOLDER / name), family=family)
    base = skeleton(teacher)
    assert base.resolution == 1024
    assert {part: _count(teacher, part) for part in parameters} == parameters
    modules = dict(base.denoiser.named_modules())
    kinds = Counter(type(module).__name__ for module in modules.values())
    assert {kind: kinds[kind] for kind in base.denoiser._no_split_modules} == blocks
    for target in base.adapted_modules(base.denoiser.config):
        assert any(f".{module}".endswith(f".{target}") for module in modules), target
    assert base.conditioning_shapes(base.denoiser.config, num_tokens=131_072) == conditioning


def _count(teacher: Teacher, part: str) -> int:
    (shapes,) = files.shapes_from_configuration(teacher, [part]).values()
    return sum(map(prod, shapes.values()))


@pytest.mark.parametrize("name", published_teachers.FOLDERS.values())
def test_a_published_folder_is_small_and_holds_no_weights(name):
    paths = [path for path in (published_teachers.FOLDER / name).rglob("*") if path.is_file()]
    assert all(path.suffix == ".json" for path in paths)
    assert sum(path.stat().st_size for path in paths) < 10_000
    for path in paths:
        json.loads(path.read_text())
