"""The hanzi subject: what is asked for, what is drawn, and the teacher that is put together for it."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

import assemble
import draw
import measure_reading
from mlcm_rl.data.prompts import CaptionedImages, Prompt, read_prompts
from reward_models.named_colour import named_colour
from reward_models.ocr import QUOTED, asked_text


@pytest.fixture(scope="module")
def prompts():
    return {split: read_prompts(draw.SUBJECT / "prompts" / f"{split}.jsonl") for split in draw.SPLITS}


def test_the_prompt_files_are_what_the_program_writes(prompts):
    for split in draw.SPLITS:
        lines = (draw.SUBJECT / "prompts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == list(draw.prompts_of_split(split))


def test_no_prompt_is_in_two_splits_and_each_asks_for_every_character_in_both_languages(prompts):
    seen = [prompt.prompt for split in draw.SPLITS for prompt in prompts[split]]
    assert len(set(seen)) == len(seen)
    for split in draw.SPLITS:
        asked = {(prompt.concept, prompt.language) for prompt in prompts[split]}
        assert asked == {(hanzi, language) for hanzi in draw.HANZI for language in draw.LANGUAGES}, split


def test_every_prompt_quotes_its_character_and_names_a_colour_of_the_inks(prompts):
    for prompt in (one for split in draw.SPLITS for one in prompts[split]):
        assert asked_text(prompt.prompt, re.compile(QUOTED)) == prompt.concept
        assert named_colour(prompt.prompt) in draw.COLOURS


def test_a_drawing_has_the_ink_and_the_face_that_its_captions_say(tmp_path):
    pytest.importorskip("pylopdf_fonts_zh_cn", reason="no Chinese font: pip install 'mlcm-rl[hanzi]'")
    assert draw.write_image_folder(tmp_path) == len(draw.DRAWINGS)
    captioned = CaptionedImages(tmp_path, draw.SIDE)
    for picture, captions, drawing in zip(captioned.pictures(), captioned.prompts, draw.DRAWINGS, strict=True):
        darkest = picture.flatten(1)[:, picture.sum(0).argmin()]
        assert tuple(darkest.tolist()) == drawing.ink
        assert all(drawing.hanzi in text and draw.split_of(text) == "train" for text in captions)
        assert (picture[:, [0, -1]] == 255).all(), "the ink touches the edge"
    assert len({picture.numpy().tobytes() for picture in captioned.pictures()}) == len(draw.DRAWINGS)


def test_the_teacher_is_the_emoji_teacher_with_a_denoiser_of_its_own(tmp_path):
    assemble.assemble(tmp_path / "teacher", assemble.new_denoiser())
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(['a red "山"'], num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, draw.SIDE, draw.SIDE)
    shared = (assemble.EMOJI / "vae").rglob("*.safetensors")
    for path in shared:
        assert path.read_bytes() == (tmp_path / "teacher" / "vae" / path.name).read_bytes()
    assert not list((tmp_path / "teacher").rglob("*.png"))


def test_a_picture_is_read_right_where_the_character_asked_for_is_the_likeliest():
    prompts = [Prompt("", "zh", concept=hanzi) for hanzi in "水山"]
    scores = torch.full((2, len(draw.HANZI)), -9.0)
    scores[:, draw.HANZI.index("水")] = -3.0
    assert measure_reading.right(scores, prompts, list(draw.HANZI)).tolist() == [True, False]


def test_the_shipped_denoiser_is_small_half_precision_and_of_the_form_that_is_trained():
    path = assemble.KEPT / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size < 10_000_000
    shipped = load_file(path)
    assert {value.dtype for value in shipped.values()} == {torch.float16}
    assemble.new_denoiser().load_state_dict(shipped)
    assert "_name_or_path" not in json.loads((assemble.KEPT / "config.json").read_text(encoding="utf-8"))
