"""Text encoders and tokenizers of an export, in files that both transformers 4 and 5 read."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..storage.files import read_json, write_json

PREFIX = "text_model."  # before a CLIPTextModel's weights in every published file; transformers 5 has none in memory
# In transformers 5 this is another name of CLIPTokenizer. In 4, CLIPTokenizer ignores tokenizer.json and, without ftfy,
# splits Chinese at every character, which changes the prompt without a warning.
FAST_TOKENIZER = "CLIPTokenizerFast"


def write_for_transformers_4(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Add the files that transformers 4 needs to a saved `pipeline` in `folder`; 5 loads the same as without them."""
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
    """Save the tower's weights under prefixed names.

    transformers 5 saves a tower that was not loaded from a published file under bare names, of which transformers 4
    finds none, so that it initialises all weights at random.
    """
    weights = {f"{PREFIX}{name.removeprefix(PREFIX)}": value for name, value in encoder.state_dict().items()}
    encoder.save_pretrained(folder, state_dict=weights, save_original_format=False)


def _write_vocabulary(file: Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json, for tools that use transformers 4's slow tokenizer.

    The vocabulary includes the added tokens, under their own ids.
    """
    tokenizer = read_json(file, model=dict, added_tokens=list)
    model = tokenizer["model"]
    words = model["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    file.with_name("vocab.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
