"""Distances of latents by a network: LPIPS beside its functional form, the teacher's blocks beside its own passes."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import tiny
from mlcm_rl.models import lpips, perceptual, teachers
from mlcm_rl.recipe import Teacher
from mlcm_rl.recipe.lpips_layout import VGG_DEPTHS, VGG_WIDTHS, layout_of, new_layout
from tiny_families import CASES

CPU = torch.device("cpu")
WIDTHS, DEPTHS = (3, 5, 4), (2, 1, 2)
SOON, SLOW = ("sd3", "z_image"), [pytest.mark.slow]  # text and picture in one block, and in one sequence


def random_weights(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.rand(shape, generator=generator) - 0.3 for name, shape in shapes.items() if shape}
    weights |= {name: value.abs() for name, value in weights.items() if "running_var" in name or "lin" in name}
    return weights | {name: torch.tensor(7) for name, shape in shapes.items() if not shape}


def with_norms(widths: tuple[int, ...] = VGG_WIDTHS) -> dict[str, list[int]]:
    """The shapes of E-LatentLPIPS: a batch norm after each convolution, and VGG's indices with norms."""
    found, index, inputs = {}, 0, 4
    for k, (width, depth) in enumerate(zip(widths, VGG_DEPTHS, strict=True)):
        for _ in range(depth):
            name, norm = f"net.slice{k + 1}.{index}", f"net.slice{k + 1}.{index + 1}"
            found |= {f"{name}.weight": [width, inputs, 3, 3], f"{name}.bias": [width]}
            found |= {f"{norm}.{part}": [width] for part in ("weight", "bias", "running_mean", "running_var")}
            found[f"{norm}.num_batches_tracked"] = []
            index, inputs = index + 3, width
        index += 1
        found[f"lin{k}.model.1.weight"] = [1, width, 1, 1]
    return found


def stated(weights: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LPIPS on latents as the papers state it: VGG without its first three maxima, unit features, weighted squares."""
    total, slices = torch.zeros(len(a)), sum(name.startswith("lin") for name in weights)
    for k in range(slices):
        prefix = f"net.slice{k + 1}."
        indices = {int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)}
        if k == slices - 1:
            a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
        for index in sorted(indices):
            own = {
                name.split(".")[-1]: value for name, value in weights.items() if name.startswith(f"{prefix}{index}.")
            }
            if own["weight"].ndim == 4:
                a, b = (F.conv2d(x, own["weight"], own["bias"], padding=1) for x in (a, b))
            else:
                mean, var = own["running_mean"], own["running_var"]
                a, b = (F.batch_norm(x, mean, var, own["weight"], own["bias"], eps=1e-5) for x in (a, b))
            is_norm_next = index + 1 in indices
            if not is_norm_next:
                a, b = a.relu(), b.relu()
        unit = [x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b)]
        squares = (unit[0] - unit[1]) ** 2
        total = total + F.conv2d(squares, weights[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
    return total


@pytest.mark.parametrize("kind", ["small", "vgg", "vgg_norms"])
def test_lpips_is_its_functional_form_on_random_weights(kind, tmp_path):
    shapes = {
        "small": new_layout(4, WIDTHS, DEPTHS).shapes(),
        "vgg": new_layout(4, VGG_WIDTHS, VGG_DEPTHS).shapes(),
        "vgg_norms": with_norms(),
    }[kind]
    weights = random_weights(shapes)
    save_file(weights, tmp_path / "lpips.safetensors")
    a, b = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for place in (tmp_path, tmp_path / "lpips.safetensors"):
        network = lpips.load(place, 4, CPU)
        torch.testing.assert_close(network(a, b), stated(weights, a, b), rtol=1e-4, atol=1e-6)
    assert not any(value.requires_grad for value in network.parameters())


def test_the_layout_of_vgg_has_torchvisions_indices():
    shapes = new_layout(4, VGG_WIDTHS, VGG_DEPTHS).shapes()
    convolutions = [name.split(".")[2] for name, shape in shapes.items() if len(shape) == 4 and name.startswith("net")]
    assert list(map(int, convolutions)) == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert layout_of(shapes) == new_layout(4, VGG_WIDTHS, VGG_DEPTHS)
    assert layout_of(with_norms()).shapes() == with_norms()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin0.model.1.weight": None}, "1 tensors .* lin0.model.1.weight: expected .*, found none"),
        ({"net.slice1.0.bias": [4]}, r"net.slice1.0.bias: expected \[3\], found \[4\]"),
        ({"lins.0.model.1.weight": [1, 3, 1, 1]}, "lins.0.model.1.weight: expected none, .*models.lpips"),
        ({"net.slice2.5.weight": [5, 9, 3, 3]}, "3 channels is followed by one that takes 9"),
        ({"net.slice2.5.weight": None}, "no convolutions"),
    ],
)
def test_other_networks_are_refused_by_the_tensor_that_does_not_fit(change, message):
    shapes = new_layout(4, WIDTHS, DEPTHS).shapes() | change
    with pytest.raises(ValueError, match=message):
        layout_of({name: shape for name, shape in shapes.items() if shape is not None})


def test_published_weights_are_converted(tmp_path):
    weights = random_weights(with_norms((3, 4, 5, 6, 7)))
    copies = {name.replace("lin", "lins.", 1): value for name, value in weights.items() if name.startswith("lin")}
    source, out = tmp_path / "published.pth", tmp_path / "lpips.safetensors"
    torch.save({f"module.{name}": value for name, value in (weights | copies).items()}, source)
    lpips.convert(source, out)
    loaded = lpips.load(out, 4, CPU).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in weights.items())
    with pytest.raises(ValueError, match="compares latents of 4 channels, and the teacher's have 16"):
        lpips.load(out, 16, CPU)
    copies["lins.0.model.1.weight"] = copies["lins.0.model.1.weight"] + 1
    torch.save(weights | copies, source)
    with pytest.raises(ValueError, match="its copy, differ"):
        lpips.convert(source, out)


def test_a_gradient_that_is_taken_at_once_is_autograds():
    a = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def distance(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1).sin()

    outside = torch.tensor([1.0, 2.0, 3.0])
    (expected,) = torch.autograd.grad((outside * distance(a)).sum(), a)
    value = perceptual.with_gradient(distance, a, scale=1024.0)
    (gradient,) = torch.autograd.grad((outside * value).sum(), a)
    assert torch.equal(value, distance(a))
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        assert torch.equal(perceptual.with_gradient(distance, a), value)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=SLOW * (name not in SOON)) for name, case in CASES.items()]
)
def test_every_family_has_features_of_the_picture(case, tmp_path):
    refuse_features_that_do_not_work(case.load(case.write(tmp_path / case.family)), list(case.prompts))


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_a_unet_has_features_of_the_picture(tmp_path, quantise):
    if quantise:
        pytest.importorskip("bitsandbytes")
    teacher = Teacher(path=str(tiny.sdxl(tmp_path)), family="sdxl", guidance_scale=3.0, quantise=quantise)
    refuse_features_that_do_not_work(teachers.load(teacher, CPU), ["a cat", "红苹果"])


def refuse_features_that_do_not_work(base, prompts: list[str]) -> None:
    """The first two blocks see the picture, alone in its row, under the noise that both have, and have a gradient."""
    conditioning = base.encode_prompts(prompts)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(len(prompts), *base.latent_shape, generator=generator) for _ in range(2))
    noise = base.noise(generator, 1)

    def distance(a, b, conditioning=conditioning):
        return perceptual.teacher_distance(base, a, b, conditioning, noise, 49, [0, 1])

    a.requires_grad_()
    value = distance(a, b)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert (value > 0).all()
    assert (distance(a, a) == 0).all()
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert not any(value.requires_grad for value in base.denoiser.parameters())
    with torch.no_grad():
        rise = (distance(a + 1e-2 * gradient / gradient.norm(), b) - value).sum()
        swapped = distance(torch.stack([a[0], b[1]]), b)
    assert rise.item() == pytest.approx(1e-2 * gradient.norm().item(), rel=0.2)
    torch.testing.assert_close(swapped, torch.stack([value[0].detach(), torch.tensor(0.0)]), rtol=1e-3, atol=1e-6)


def test_blocks_that_a_denoiser_lacks_are_refused(tiny_sdxl):
    base = teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl"), CPU)
    count = len(base.blocks(base.denoiser))
    perceptual.refuse_blocks(base, [count - 1])
    with pytest.raises(ValueError, match=f"feature_blocks: {count}, and .* has {count} blocks"):
        perceptual.refuse_blocks(base, [count])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * 0, "two different latents are not apart"),
        (lambda value: -value.abs(), "two different latents are not apart"),
        (lambda value: value * torch.nan, "not made of finite numbers: the file is damaged"),
        (lambda value: value.int(), "is in int32: only weights in floating point"),
    ],
    ids=["zero", "negative", "nan", "integers"],
)
def test_weights_by_which_nothing_can_be_learned_are_refused(tmp_path, change, message):
    """Of zeros the loss is 0 and so is its gradient: a run would end with the student that it began with."""
    place = tmp_path / "lpips.safetensors"
    state = lpips.new(new_layout(4, [4, 6], [1, 1]), 0).state_dict()
    save_file({name: change(value) if name.startswith("lin") else value for name, value in state.items()}, place)
    with pytest.raises(ValueError, match=message):
        lpips.load(place, 4, CPU)
