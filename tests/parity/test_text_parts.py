"""What transformers 4 needs of an export is written, and transformers 5 loads the same as without it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from mlcm_rl.models.text_parts import write_for_transformers_4

EMOJI = Path(__file__).parents[2] / "recipes" / "emoji" / "teacher"  # its first tower's weights have bare names
PROMPTS = ["a red apple", "红苹果，写实风格"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[StableDiffusionXLPipeline, Path]:
    folder = tmp_path_factory.mktemp("written")
    pipeline = StableDiffusionXLPipeline.from_pretrained(EMOJI, unet=None, vae=None)
    pipeline.save_pretrained(folder)
    write_for_transformers_4(pipeline, folder)
    return pipeline, folder


def test_both_towers_have_the_names_of_published_files_and_the_same_weights(written):
    pipeline, folder = written
    for part in ("text_encoder", "text_encoder_2"):
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert {name for name in names if not name.startswith("text_model.")} <= {"text_projection.weight"}
        before = getattr(pipeline, part).state_dict()
        after = type(getattr(pipeline, part)).from_pretrained(folder / part).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_tokenizers_table_is_written_as_it_was_published(written):
    _, folder = written
    for part in ("tokenizer", "tokenizer_2"):
        table = json.loads((folder / part / "vocab.json").read_text(encoding="utf-8"))
        assert table == json.loads((EMOJI / part / "vocab.json").read_text(encoding="utf-8"))
        assert (folder / part / "merges.txt").read_bytes() == (EMOJI / part / "merges.txt").read_bytes()


def test_the_tokenizer_reads_the_same_from_either_form_and_the_index_names_the_one_that_reads_both(written, tmp_path):
    pipeline, folder = written
    expected = pipeline.tokenizer(PROMPTS)["input_ids"]
    opened = StableDiffusionXLPipeline.from_pretrained(folder, unet=None, vae=None)
    assert opened.tokenizer(PROMPTS)["input_ids"] == expected
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == index["tokenizer_2"] == ["transformers", "CLIPTokenizerFast"]
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    assert CLIPTokenizer.from_pretrained(tmp_path)(PROMPTS)["input_ids"] == expected


def test_words_that_were_added_later_are_in_the_table(written, tmp_path):
    pipeline, _ = written
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    tokenizer.add_tokens(["<my-style>"])
    changed = StableDiffusionXLPipeline(**(pipeline.components | {"tokenizer": tokenizer}))
    changed.save_pretrained(tmp_path)
    write_for_transformers_4(changed, tmp_path)
    table = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert table["<my-style>"] == tokenizer.convert_tokens_to_ids("<my-style>") == len(tokenizer) - 1
