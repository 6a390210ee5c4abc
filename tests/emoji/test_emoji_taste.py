"""The pairs of `recipes/emoji_taste.yaml`, and the program that packed them."""

import torch

import runs
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.data.prompts import read_prompts
from pack_pairs import packed


def test_the_shipped_pairs_are_of_training_prompts_in_both_languages(emoji_folder):
    table = PairTable(emoji_folder / "taste.parquet")
    known = {prompt.prompt: prompt.language for prompt in read_prompts(emoji_folder / "prompts" / "train.jsonl")}
    assert len(table) == 160
    assert {prompt.prompt: prompt.language for prompt in table.prompts}.items() <= known.items()
    assert [[one.language for one in table.prompts].count(name) for name in ("en", "zh")] == [80, 80]
    chosen, rejected = table.pictures(159, 64)
    assert not torch.equal(chosen, rejected)


def test_a_packed_table_is_the_folders(tmp_path):
    folder = PairTable(runs.write_pairs(tmp_path / "pairs"))
    packed(folder.folder).to_parquet(tmp_path / "pairs.parquet")
    table = PairTable(tmp_path / "pairs.parquet")
    assert table.prompts == folder.prompts
    for i in range(len(folder)):
        assert torch.equal(table.pictures(i, 16), folder.pictures(i, 16))
