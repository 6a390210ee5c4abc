"""CLIP for the reward models over it: two architectures, the vocabulary, the features and their cosine."""

import gzip
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from mlcm_rl.rewards import HubFile, PipFile, Weights

from ._published import network, opened, tokens, wide

_BOS_EOS = {"bos_token_id": 49406, "eos_token_id": 49407}
VIT_L_14 = {  # OpenAI's
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        **_BOS_EOS,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
}
VIT_H_14 = {  # OpenCLIP's, trained on LAION-2B
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        **_BOS_EOS,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}

CLIP_L_14 = Weights(
    "clip_vit_l_14",
    HubFile("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "model.safetensors"),
    sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    licence="MIT",
)
CLIP_MERGES = Weights(  # the file of OpenAI's repository, unchanged; the package's code is not used
    "clip_merges",
    PipFile("open_clip_torch", "3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz"),
    sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    licence="MIT",
    convert="reward_models._clip:merges_of",
)
NUM_TOKENS = 49408
NUM_BYTES = 256
START, END = "<|startoftext|>", "<|endoftext|>"


def merges_of(path: Path) -> dict[str, Tensor]:
    """The merges that CLIP uses of the longer published list, their UTF-8 text as uint8."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    used = lines[1 : 1 + NUM_TOKENS - 2 * NUM_BYTES - 2]  # the first line is a title
    return {"merges": torch.tensor(list("\n".join(used).strip("\n").encode()), dtype=torch.uint8)}


def clip_tokenizer(merges: str) -> CLIPTokenizer:
    """OpenAI's byte-pair tokenizer over `merges`, two symbols a line.

    Its tokens are numbered: the 256 bytes, the bytes at the end of a word, what each merge makes, start and end.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    # A byte that does not print is shown as the next free character from 256 on; CLIP numbers it after the others.
    symbols = [chr(byte) for byte in printable] + [chr(NUM_BYTES + index) for index in range(len(others))]
    pairs = [tuple(line.split(" ")) for line in merges.split("\n")]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, pairs), START, END]
    return CLIPTokenizer({word: index for index, word in enumerate(words)}, pairs)


def published_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from the cache."""
    return clip_tokenizer(bytes(load_file(CLIP_MERGES.path())["merges"].tolist()).decode())


class Clip:
    """A frozen CLIP with its tokenizer."""

    def __init__(
        self,
        config: CLIPConfig,
        tensors: dict[str, Tensor],
        tokenizer: CLIPTokenizer,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.model: CLIPModel = network(CLIPModel, config, tensors, device, dtype)
        self.tokenizer = tokenizer
        self.size: int = config.vision_config.image_size
        self.length: int = config.text_config.max_position_embeddings
        self.logit_scale = wide(self.model.logit_scale).exp()

    @classmethod
    def opened(cls, folder: str, device: torch.device | str, dtype: torch.dtype) -> "Clip":
        """The CLIP of a folder laid out as transformers saves one: config.json, model.safetensors, tokenizer files."""
        return cls(*opened(folder, CLIPConfig, CLIPTokenizer), device, dtype)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Projected features (B, D) of `pixels` (B, 3, size, size), normalised channels."""
        return wide(self.model.get_image_features(pixels.to(self.model.dtype)).pooler_output)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Projected features (B, D) of `prompts`, taken at their end token. What pads them is never looked at."""
        return wide(self.model.get_text_features(self.token_ids(prompts)).pooler_output)

    def token_ids(self, prompts: list[str]) -> Tensor:
        """(B, L) int64, between a start and an end token, padded to the longest that the model takes."""
        ids: Tensor = tokens(self.tokenizer, prompts, self.length, self.model.device).input_ids
        return ids

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (B,) of the features of `pixels` and `prompts`, each picture with its own prompt."""
        return F.cosine_similarity(self.image_features(pixels), self.text_features(prompts))
