"""The network of a text adapter, its files, and the encoders that it is over."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel

import text_adapters
import tiny
from mlcm_rl.models import text_adapter, text_encoder
from mlcm_rl.models.text_adapter import Sizes, TextAdapter, stacked_states
from mlcm_rl.models.text_encoder import TextEncoder
from mlcm_rl.recipe.families import adaptable
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.storage.hashing import folder_hash, network_hash
from tiny_families import CASES

SIZES = Sizes(states=22, width=24, num_layers=2, context=(7, 10), pooled=6)
SHAPES = {"context": (7, 10), "pooled": (6,)}
CPU = torch.device("cpu")


def adapter(sizes: Sizes = SIZES) -> TextAdapter:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return TextAdapter(sizes)


def states(*lengths: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(length, SIZES.states, generator=draws) for length in lengths]


def test_training_starts_at_the_mean_of_the_teachers_own_encodings():
    draws, network = torch.Generator().manual_seed(2), adapter()
    own = {"context": torch.randn(9, 7, 10, generator=draws), "pooled": torch.randn(9, 6, generator=draws)}
    network.measure(states(4, 5), own)
    made = network(*stacked_states(states(3, 5), CPU))
    for name, value in own.items():
        torch.testing.assert_close(made[name], value.mean(0).expand_as(made[name]))


def test_a_token_that_never_differs_is_made_exactly():
    draws, network = torch.Generator().manual_seed(2), adapter()
    context = torch.randn(9, 7, 10, generator=draws)
    context[:, 0] = 123.25
    network.measure(states(4, 5), {"context": context, "pooled": torch.randn(9, 6, generator=draws)})
    tiny.perturb(list(network.parameters()))
    made = network(*stacked_states(states(3, 5), CPU))["context"]
    assert (made[:, 0] == 123.25).all()
    assert not torch.allclose(made[0, 1], made[1, 1])


def test_what_is_alike_in_all_states_does_not_count():
    """Encoders add the same large vector to every state, and scale features unlike."""
    plain, shifted = adapter(), adapter()
    own = {"context": torch.randn(2, 7, 10), "pooled": torch.randn(2, 6)}
    first = states(4, 5)
    second = [100.0 + one * torch.linspace(0.5, 30.0, SIZES.states) for one in first]
    made = []
    for network, those in ((plain, first), (shifted, second)):
        network.measure(those, own)
        tiny.perturb(list(network.parameters()))
        made.append(network(*stacked_states(those, CPU)))
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], atol=1e-4, rtol=1e-4)


def test_the_prompts_beside_one_do_not_change_it():
    network = adapter()
    tiny.perturb(list(network.parameters()))
    short, long = states(2, 6)
    alone, beside = network(*stacked_states([short], CPU)), network(*stacked_states([short, long], CPU))
    for name, value in alone.items():
        torch.testing.assert_close(value[0], beside[name][0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(beside[name][0], beside[name][1])


def test_a_denoiser_without_a_pooled_vector_gets_none():
    network = adapter(Sizes(22, 24, 1, (7, 10), 0))
    assert set(network(*stacked_states(states(2), CPU))) == {"context"}


def test_weights_are_counted_without_making_them():
    assert text_adapter.num_weights(SIZES) == sum(value.numel() for value in adapter().parameters())


def test_it_makes_what_families_take_that_say_so():
    """And no other: the flag in the list of families is about the tensors of a conditioning."""
    able = {name for name, case in CASES.items() if set(case_shapes(case)) <= {"context", "pooled"}}
    assert able | {"sd", "sdxl"} == set(adaptable())
    with pytest.raises(ValueError, match="needs lengths too"):
        Sizes.for_conditioning({"context": (3, 4), "lengths": ()}, 22, 24, 1)


def case_shapes(case) -> dict:
    from mlcm_rl.models.teachers import class_of

    return class_of(case.family).conditioning_shapes(AnyConfig(), 12)


class AnyConfig(dict):
    """A configuration that has every key."""

    def __missing__(self, key):
        return 8

    def get(self, key, default=None):
        return self[key]


# ---- files ----


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of an adapter for a teacher of a family `sdxl`."""
    folder, network = tmp_path / "saved", adapter()
    tiny.perturb(list(network.parameters()))
    encoder = Path(text_adapters.encoder(tmp_path / "encoder"))
    (encoder / "pytorch_model.bin").write_bytes(b"code")
    description = text_adapter.describe(SIZES, ["zh", "ja"], 12, "sdxl", "hash")
    text_adapter.save(network, description, encoder, folder)
    shutil.rmtree(encoder)
    return folder


def load(folder: Path, family: str = "sdxl", shapes: dict = SHAPES) -> text_adapter.AdaptedEncoder:
    return text_adapter.load(folder, family, shapes, 24, CPU)


def test_it_is_read_as_it_was_written_with_its_encoder(saved):
    adapted = load(saved)
    expected = adapter()
    tiny.perturb(list(expected.parameters()))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in adapted.adapter.state_dict().items())
    assert not any(
        value.requires_grad for value in [*adapted.adapter.parameters(), *adapted.encoder.model.parameters()]
    )
    assert [adapted.reads(text) for text in ("a cat", "猫", "ねこ", "고양이")] == [False, True, True, False]
    assert adapted.encoder.num_tokens == 12
    assert {name: value.shape for name, value in adapted.encode(["红苹果", "猫"]).items()} == {
        "context": (2, 7, 10),
        "pooled": (2, 6),
    }
    assert not (saved / "encoder" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "text_adapter.json").unlink(),
            r"the folder .* holds no text adapter \(text_adapter.json\), as an adapt_text stage leaves it",
        ),
        (lambda folder: (folder / "text_adapter.safetensors").write_bytes(b"x"), "text_adapter.safetensors is damaged"),
        (lambda folder: (folder / "encoder" / "model.safetensors").write_bytes(b"x"), "model.safetensors is damaged"),
        (lambda folder: rewrite(folder, format=2), "written in format 2, this version reads 1"),
        (lambda folder: rewrite(folder, sizes={"states": 1}), "text_adapter.json is damaged: sizes"),
        (lambda folder: rewrite(folder, sizes=sizes(width=32)), "tensors do not fit the network"),
        (lambda folder: rewrite(folder, sizes=sizes(width=0)), "width: Input should be greater than 0"),
        (lambda folder: rewrite(folder, sizes=sizes(num_layers=10**9)), "num_layers: Input should be less than"),
        (lambda folder: rewrite(folder, languages=[]), "languages: .*at least 1 item"),
        (lambda folder: rewrite(folder, languages=["en"]), "0: Input should be 'zh', 'ja' or 'ko'"),
        (lambda folder: weights_as(folder, torch.float16), "is torch.float16, not torch.float32"),
        (lambda folder: other_encoder(folder), "an encoder of states of width 20, and .* is of one of 22"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_name_of_its_file(saved, change, message):
    change(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def weights_as(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "text_adapter.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)


def other_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "encoder")
    text_adapters.encoder(folder / "encoder", width=20)


def test_weights_that_are_not_finite_make_no_conditioning(saved):
    path = saved / "text_adapter.safetensors"
    weights = load_file(path)
    weights["queries"][0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"猫.* is not finite"):
        load(saved).encode(["猫"])


def test_a_prompt_has_the_same_bits_whatever_is_beside_it(saved):
    adapted = load(saved)
    alone, beside = adapted.encode(["猫"]), adapted.encode(["一只狗在跑", "猫"])
    assert all(torch.equal(value[0], beside[name][1]) for name, value in alone.items())


def rewrite(folder: Path, **changes) -> None:
    path = folder / "text_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sizes(**changes) -> dict:
    return {"states": 22, "width": 24, "num_layers": 2, "context": [7, 10], "pooled": 6} | changes


@pytest.mark.parametrize(
    ("family", "shapes", "message"),
    [
        ("sd3", SHAPES, "7 states of width 10 and a pooled vector of 6 for a sdxl teacher, and this sd3 teacher"),
        ("sdxl", {"context": (7, 11), "pooled": (6,)}, "this sdxl teacher takes 7 states of width 11 and a pooled"),
        ("sdxl", {"context": (7, 10)}, "takes 7 states of width 10 and no pooled vector"),
    ],
)
def test_an_adapter_of_another_kind_of_teacher_is_refused(saved, family, shapes, message):
    with pytest.raises(ValueError, match=message):
        load(saved, family, shapes)


# ---- encoders ----


def test_a_prompt_is_encoded_by_itself_and_no_longer_than_is_read(tmp_path):
    encoder = TextEncoder(Path(text_adapters.encoder(tmp_path)), 12, CPU)
    assert encoder.encode("红苹果").shape == (5, 22)
    assert encoder.encode("红" * 40).shape == (12, 22)
    assert encoder.count_tokens("红" * 40) == 42
    assert TextEncoder(tmp_path, 100, CPU).num_tokens == 16  # its own positions


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_of_a_model_with_other_parts_the_texts_are_read(tmp_path, kind):
    tokenizer = tiny.tokenizer() if kind == "clip" else tiny.t5_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    if kind == "clip":
        text = tiny._text_config(width=24, layers=2).to_dict()
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 8, "patch_size": 4}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    else:
        sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    encoder = TextEncoder(tmp_path, 12, CPU)
    assert encoder.encode("a cat").shape[1] == text_encoder.states_width(tmp_path) == 24


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    path = Path(text_adapters.encoder(tmp_path)) / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layer.1.output" not in name}, path)
    with pytest.raises(ValueError, match=r"of its weights are not in its files, such as encoder\.layer\.1\.output"):
        TextEncoder(tmp_path, 12, CPU)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(tmp_path):
    text_adapters.encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:9].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    with pytest.raises(ValueError, match=r"its tokenizer has .* tokens, its model 9"):
        TextEncoder(tmp_path, 12, CPU)


def test_a_tokenizer_without_its_file_of_words_is_refused(tmp_path):
    """transformers would make one that knows no word."""
    text_adapters.encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer has no words"):
        TextEncoder(tmp_path, 12, CPU)


@pytest.mark.parametrize(
    ("length", "message"), [(2, "2 tokens of a prompt are read, and 2 are marks"), ("many", "expected a number")]
)
def test_a_tokenizer_that_reads_no_word_is_refused(tmp_path, length, message):
    path = Path(text_adapters.encoder(tmp_path)) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(ValueError, match=message):
        TextEncoder(tmp_path, 12, CPU)


def test_the_words_of_sentencepiece_are_copied_and_hashed(tmp_path):
    folder = Path(text_adapters.encoder(tmp_path / "encoder"))
    before = network_hash(folder)
    assert before == folder_hash(folder)
    (folder / "spiece.model").write_bytes(b"words")
    first = network_hash(folder)
    (folder / "spiece.model").write_bytes(b"others")
    assert len({before, first, network_hash(folder)}) == 3
    text_encoder.copy_files(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "spiece.model").read_bytes() == b"others"


@pytest.mark.parametrize("wrong", ["code", "nothing"])
def test_a_folder_that_is_no_encoder_is_refused(tmp_path, wrong):
    text_adapters.encoder(tmp_path)
    if wrong == "code":  # weights that can run code are not read
        torch.save({}, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    else:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="could not be loaded"):
        TextEncoder(tmp_path, 12, CPU)
