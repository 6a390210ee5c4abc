"""Text encoders and tokenizers of an export, in the files and names that transformers 4 reads as well as 5."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..storage.files import read_json, write_json

PREFIX = "text_model."  # before a CLIPTextModel's weights in every published file; transformers 5 has none in memory
# Another name of the same class in transformers 5. In 4 the other class reads no tokenizer.json, and without ftfy it
# cuts Chinese at every character: the prompt becomes another one, in silence.
FAST_TOKENIZER = "CLIPTokenizerFast"


def write_for_transformers_4(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Add to a saved `pipeline` in `folder` what transformers 4 needs; 5 loads the same as without it."""
    index = read_json(folder / "model_index.json")
    for name, part in pipeline.components.items():
        kind = type(part).__name__
        if kind == "CLIPTextModel":
            _write_prefixed(part, folder / name)
        if kind == "CLIPTokenizer":
            _write_vocabulary(folder / name / "tokenizer.json")
            index[name] = ["transformers", FAST_TOKENIZER]
    write_json(folder / "model_index.json", index)


def _write_prefixed(encoder: Any, folder: Path) -> None:
    """A tower that was not loaded from a published file is saved under bare names: transformers 4 finds none of them
    and draws all weights at random."""
    weights = {f"{PREFIX}{name.removeprefix(PREFIX)}": value for name, value in encoder.state_dict().items()}
    encoder.save_pretrained(folder, state_dict=weights, save_original_format=False)


def _write_vocabulary(file: Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json, for tools that take transformers 4's other tokenizer.

    Words that were added later are in the vocabulary too, under their own numbers.
    """
    described = read_json(file, model=dict, added_tokens=list)
    model = described["model"]
    words = model["vocab"] | {token["content"]: token["id"] for token in described["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    file.with_name("vocab.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
