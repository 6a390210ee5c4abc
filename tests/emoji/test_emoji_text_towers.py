"""The bilingual tokenizer and the two text towers: the shipped ones, and a few steps of training."""

import pytest
import torch
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import train_text_towers as program
from captions import captions_of, teacher_concepts
from e5 import E5File
from sources import EMOJI

FOLDERS = ("tokenizer", "tokenizer_2")
WORDS = {"red": "红", "green": "绿", "panda": "熊猫", "apple": "苹果", "car": "汽车", "moon": "月亮"}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMOJI / "teacher" / "tokenizer")


@pytest.fixture(scope="module")
def towers() -> list[program.Tower]:
    folder = EMOJI / "teacher"
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return [kind.from_pretrained(folder / name, dtype=torch.float32).eval() for name, kind in kinds.items()]


@pytest.mark.parametrize("name", FOLDERS)
def test_all_512_byte_symbols_are_in_the_vocabulary(emoji_folder, name):
    vocabulary = CLIPTokenizer.from_pretrained(emoji_folder / "teacher" / name).get_vocab()
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert len({letter + end for letter in letters for end in ("", "</w>")} & vocabulary.keys()) == 512


def test_no_chinese_character_is_unknown_and_each_is_read_back(tokenizer):
    characters = [chr(point) for point in (*range(0x4E00, 0xA000, 7), 0x3400, 0x20000, 0x2A6DF)]
    for character, ids in zip(characters, tokenizer(characters).input_ids, strict=True):
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == character


def test_bos_eos_and_pad_of_both_towers_are_the_tokenizers(tokenizer, towers):
    wanted = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for tower in towers:
        assert (tower.config.bos_token_id, tower.config.eos_token_id, tower.config.pad_token_id) == wanted
        assert tower.config.vocab_size == len(tokenizer)
        assert tower.config.max_position_embeddings == tokenizer.model_max_length


def test_pooled_vectors_differ_and_would_not_with_a_wrong_eos(tokenizer, towers):
    ids = program.tokenize(tokenizer, ["panda", "火箭"])
    with torch.no_grad():
        first, second = towers[1](ids).text_embeds
        right = towers[1].config.eos_token_id
        towers[1].text_model.eos_token_id = tokenizer.bos_token_id
        towers[1].config.eos_token_id = tokenizer.bos_token_id
        wrong = towers[1](ids).text_embeds
        towers[1].text_model.eos_token_id = towers[1].config.eos_token_id = right
    assert F.cosine_similarity(first, second, dim=0) < 0.9
    torch.testing.assert_close(wrong[0], wrong[1], rtol=0, atol=1e-5)


def test_shipped_towers_find_a_concept_across_languages(tokenizer, towers):
    concepts = teacher_concepts()[0][::4]
    texts = [captions_of(c, "noto", language)[2] for language in ("en", "zh") for c in concepts]
    ids = program.tokenize(tokenizer, texts)
    for tower in towers:
        for vectors in program.read_in_parts(tower, ids).values():
            english, chinese = (F.normalize(v - v.mean(0), dim=-1) for v in vectors.split(len(concepts)))
            found = (chinese @ english.T).argmax(1) == torch.arange(len(concepts))
            assert found.float().mean() > 0.95


def made_up_concepts() -> list[program.Concept]:
    return [program.Concept(en, "group", "subgroup", en, zh, (), ()) for en, zh in WORDS.items()]


def test_a_few_steps_change_the_towers_and_lower_the_loss():
    concepts = made_up_concepts()
    tokenizer = program.train_tokenizer(program.all_captions(concepts), 700, 16)
    settings = program.TowerSettings(num_steps=12, num_pairs=4, max_length=16)
    towers, losses = program.build_towers(tokenizer, seed=0), []
    before = [tower.get_input_embeddings().weight.clone() for tower in towers]
    targets = F.normalize(torch.randn(len(concepts), 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    batches = program.CaptionBatches(concepts, tokenizer, settings.num_pairs, seed=0)
    program.train(towers, batches, targets, settings, lambda step, loss: losses.append(loss))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for tower, weight in zip(towers, before, strict=True):
        assert not torch.equal(tower.get_input_embeddings().weight, weight)


def test_a_trained_tokenizer_survives_its_own_files(tmp_path):
    made = program.train_tokenizer(program.all_captions(made_up_concepts()), 700, 16)
    program.save_tokenizer(made, tmp_path)
    texts = ["red panda, noto style", "谷歌风格的熊猫表情"]
    assert CLIPTokenizer.from_pretrained(tmp_path)(texts).input_ids == made(texts).input_ids
    (tmp_path / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(tmp_path)(texts).input_ids == made(texts).input_ids, "vocab.json + merges.txt"


def test_training_captions_never_come_from_the_test_split():
    batches = program.CaptionBatches(made_up_concepts(), None, 4, seed=0)
    drawn = [caption for captions in batches.captions.values() for caption in captions]
    assert drawn
    assert all(program.split_of(caption) != "test" for caption in drawn)


def test_four_bit_blocks_are_dequantised_as_written():
    block = torch.tensor([0.5], dtype=torch.float16).numpy().tobytes() + bytes([0x80 | 0x0F] + [0x88] * 15)
    found = E5File(block, None, {"w": (1, 32, 0)}).tensor("w", 2, 16)
    wanted = torch.zeros(2, 16)
    wanted[0, 0] = (15 - 8) * 0.5  # low halves of the bytes come first, high halves after
    torch.testing.assert_close(found, wanted)
