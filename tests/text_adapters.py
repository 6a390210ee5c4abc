"""A tiny text encoder for Chinese, parallel prompts, and small recipes that adapt a tiny teacher to them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import runs
from mlcm_rl.recipe import AdaptText, Recipe, Samples

PAIRS = [
    ("a cat", "一只猫"),
    ("a dog", "一只狗在跑"),
    ("a red apple", "红苹果"),
    ("a panda", "熊猫"),
    ("a house", "房子"),
]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def encoder(folder: Path, width: int = 22, seed: int = 0) -> str:
    """Write a BertModel of two layers whose words are the characters of PAIRS and its tokenizer; return `folder`."""
    words = [*MARKS, *sorted({letter for pair in PAIRS for text in pair for letter in text})]
    learner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    learner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=learner, model_max_length=16, **names).save_pretrained(folder)
    sizes = {"hidden_size": width, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return str(folder)


def write_parallel(folder: Path) -> str:
    """Write PAIRS as a prompt file with `parallel` in each line; return its path."""
    path = folder / "parallel.jsonl"
    lines = [json.dumps({"prompt": prompt, "parallel": parallel}, ensure_ascii=False) for prompt, parallel in PAIRS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def stage(prompts: str, encoder: str, **changes: Any) -> AdaptText:
    settings = {"width": 16, "num_layers": 1, "num_steps": 3, "batch_size": 4, "log_every": 1, "save_every": 1}
    settings |= {"held_out_every": 2, "warmup_steps": 0, "learning_rate": 1e-2, "sample_every": 100}
    return AdaptText(prompts=prompts, encoder=encoder, **(settings | changes))


def recipe(teacher: Path, folder: Path, family: str = "sdxl", later: list | None = None, **changes: Any) -> Recipe:
    """Trajectories of the English prompts, an adapter for the Chinese ones, and `later` stages."""
    prompts, words = write_parallel(folder), encoder(folder / "encoder")
    stages = [runs.trajectories(prompts), stage(prompts, words, **changes), *(later or [])]
    samples = Samples(prompts=["a cat", "熊猫"], sampling_steps=[1])
    return runs.recipe(teacher, folder, stages, family, samples=samples)
