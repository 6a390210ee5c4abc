"""A text encoder of any kind in a local folder: a model and a tokenizer that transformers knows. No remote code.

L' tokens of a prompt   H width of the states
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..storage.hashing import LOADED_OF_TEXTS
from ..storage.tensors import read_shapes
from ..storage.untrusted import brief, in_a_line

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class TextEncoder:
    """A frozen text encoder in float32; each prompt is encoded by itself, so that no other changes its last bits.

    It reads `num_tokens` tokens of a prompt at most, and no more than it has positions for. Raise ValueError where
    transformers cannot load the folder, CheckpointError for a damaged file of weights.
    """

    def __init__(self, folder: Path, num_tokens: int, device: torch.device):
        self.device = device
        self.tokenizer = tokenizer_of(folder)
        try:
            model, state = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **LOCAL
            )
        except Exception as error:  # of files that are not what their names say
            raise ValueError(f"text encoder {folder}: it could not be loaded: {in_a_line(error)}") from error
        self.model: nn.Module = text_part(model).to(device).requires_grad_(False).eval()
        unused = ("pooler.", *["decoder."] * has_decoder(model))  # the states do not depend on them
        missing = [name for name in sorted(state["missing_keys"]) if not name.startswith(unused)]
        if missing or state["mismatched_keys"]:  # transformers would draw them at random
            names = [*missing, *map(str, state["mismatched_keys"])]
            raise ValueError(
                f"text encoder {folder}: {len(names)} of its weights are not in its files, such as {names[0]}"
            )
        words = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if len(self.tokenizer) > words:
            raise ValueError(
                f"text encoder {folder}: its tokenizer has {len(self.tokenizer)} tokens, its model {words}"
            )
        positions = getattr(self.model.config, "max_position_embeddings", num_tokens)
        self.num_tokens = int(min(num_tokens, self.tokenizer.model_max_length, positions))
        if self.num_tokens <= (marks := self.tokenizer.num_special_tokens_to_add()):
            raise ValueError(
                f"text encoder {folder}: {self.num_tokens} tokens of a prompt are read, and {marks} are marks: no word "
                "would be read; see model_max_length in its tokenizer_config.json"
            )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of `text`, marks included; those beyond `num_tokens` are cut off."""
        return len(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """Return the last states (L', H) float32 of one prompt."""
        tokens = self.tokenizer(text, truncation=True, max_length=self.num_tokens, return_tensors="pt")
        ids, mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state[0].float()


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of the encoder in `folder`, once the files of its weights are whole.

    Raise CheckpointError for a damaged file of weights, ValueError where transformers cannot load the tokenizer, or
    would make one without words, as it does where their file is missing.
    """
    for path in sorted(folder.glob("*.safetensors")):
        read_shapes(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # of files that are not what their names say
        raise ValueError(f"text encoder {folder}: its tokenizer could not be loaded: {in_a_line(error)}") from error
    if len(tokenizer) - len(tokenizer.all_special_tokens) <= 1:  # T5's begins with a blank
        raise ValueError(f"text encoder {folder}: its tokenizer has no words: their file is missing, or empty")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(
            f"text encoder {folder}: tokenizer_config.json: model_max_length: expected a number, found "
            f"{brief(tokenizer.model_max_length)}"
        )
    return tokenizer


def text_part(model: Any) -> nn.Module:
    """Return what encodes texts in `model`: the text tower of one of texts and pictures, the encoder of one of two."""
    return model.get_encoder() if has_decoder(model) else getattr(model, "text_model", model)


def has_decoder(model: nn.Module) -> bool:
    """Return whether `model` is an encoder and a decoder, whatever its configuration says (that of T5's encoder)."""
    return {"encoder", "decoder"} <= {name for name, _ in model.named_children()}


def states_width(folder: Path) -> int:
    """Return H of the encoder in a folder, from its configuration. Raise ValueError where transformers knows none."""
    try:
        return int(AutoConfig.from_pretrained(folder, **LOCAL).get_text_config().hidden_size)
    except Exception as error:
        raise ValueError(f"text encoder {folder}: its config.json could not be used: {in_a_line(error)}") from error


def copy_files(folder: Path, out: Path) -> None:
    """Copy weights, configuration and tokenizer of the encoder in `folder` to the new folder `out`."""
    out.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in LOADED_OF_TEXTS and path.name != "manifest.json":
            shutil.copyfile(path, out / path.name)
