"""The shipped teacher: sizes, the stock pipeline opens and samples it, and what a dropped prompt is."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

import assemble_teacher as program
import rebuild
import sources


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(program.EMOJI / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folder_is_within_the_trees_limits(emoji_folder):
    sizes = [path.stat().st_size for path in (emoji_folder / "teacher").rglob("*") if path.is_file()]
    assert max(sizes) <= program.MAX_FILE_BYTES
    assert sum(sizes) <= program.MAX_TOTAL_BYTES


def test_all_weights_are_half_precision_safetensors(emoji_folder):
    files = list((emoji_folder / "teacher").rglob("*.safetensors"))
    assert not list((emoji_folder / "teacher").rglob("*.bin"))
    for path in files:
        with safe_open(path, "pt") as weights:
            types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert types == {"F16"}, path


def test_the_stock_pipeline_samples_prompts_in_both_languages(pipeline):
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["panda", "熊猫"], num_inference_steps=2, generator=generator, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
    assert torch.isfinite(images).all()


def test_a_dropped_prompt_is_zeros_for_context_and_pooled_vector(pipeline):
    context, dropped, pooled, dropped_pooled = pipeline.encode_prompt("panda", do_classifier_free_guidance=True)
    assert context.abs().min(dim=-1).values.max() > 0
    assert pooled.abs().max() > 0
    assert torch.equal(dropped, torch.zeros_like(context))
    assert torch.equal(dropped_pooled, torch.zeros_like(pooled))


def test_the_context_joins_the_penultimate_states_of_both_towers(pipeline):
    ids = pipeline.tokenizer("熊猫", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True) for m in (pipeline.text_encoder, pipeline.text_encoder_2)]
        context, _, pooled, _ = pipeline.encode_prompt("熊猫", do_classifier_free_guidance=False)
    torch.testing.assert_close(context, torch.cat([s.hidden_states[-2] for s in states], dim=-1))
    torch.testing.assert_close(pooled, states[1].text_embeds)


def test_the_schedule_is_the_one_the_trajectories_are_made_on(pipeline):
    alphas = pipeline.scheduler.alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(alphas, torch.cumprod(1 - betas, 0))
    assert (1 - alphas[0]).item() == pytest.approx(0.00085, rel=1e-3)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.scheduler.final_alpha_cumprod == alphas[0], "the last step ends at index 0, not at clean data"


def test_only_a_scaling_factor_maps_latents(pipeline):
    config = pipeline.vae.config
    assert config.get("shift_factor") is None
    assert config.get("latents_mean") is None
    assert config.scaling_factor > 0
    assert not config.force_upcast


def test_a_teacher_that_outgrows_the_tree_is_not_written(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "MAX_TOTAL_BYTES", 1_000_000)
    with pytest.raises(ValueError, match="bytes"):
        program.write_teacher(StableDiffusionXLPipeline(**pipeline.components), tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_no_configuration_names_a_folder_of_the_training_machine(emoji_folder):
    for path in (emoji_folder / "teacher").rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_build_runs_missing_steps_in_order_and_skips_those_done(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(rebuild.subprocess, "run", lambda command, **_: ran.append(command[1]))
    (tmp_path / "autoencoder").touch()
    rebuild.run_steps(["pictures", "autoencoder", "captions"], [], 1, tmp_path)
    assert ran == ["recipes/emoji/build/sources.py", "recipes/emoji/build/captions.py"]
    rebuild.run_steps(["pictures", "autoencoder", "captions"], ["captions"], 1, tmp_path)
    assert ran[2:] == ["recipes/emoji/build/captions.py"]


def test_the_card_is_measured_anew_after_the_new_weights_are_in_place(emoji_folder):
    steps = list(rebuild.STEPS)
    assert steps.index("samples") > steps.index("teacher") > steps.index("denoiser")
    program, *arguments = rebuild.STEPS["samples"]
    assert program == "recipes/emoji/build/measure_teacher.py"
    shown = json.loads((emoji_folder / "measured" / "teacher.json").read_text(encoding="utf-8"))["prompts"]
    assert arguments == ["--prompts", str(shown)], "as many as the card says"
    assert f"{' '.join(rebuild.STEPS['samples'])}`" in (emoji_folder / "README.md").read_text(encoding="utf-8")


def test_the_key_of_the_fourth_style_reaches_every_step_and_a_change_of_styles_runs_them_again(tmp_path, monkeypatch):
    keys, steps = [], ["pictures", "captions"]
    monkeypatch.setattr(rebuild.subprocess, "run", lambda *_, env, **__: keys.append(env[sources.OPENMOJI_KEY]))
    rebuild.run_steps(steps, [], 1, tmp_path)
    assert [(tmp_path / step).read_bytes() for step in steps] == [b"", b""]
    for _ in range(2):
        rebuild.run_steps(steps, [], 1, tmp_path, with_openmoji=True)
    assert keys == ["0", "0", "1", "1"]
    rebuild.run_steps(steps, [], 1, tmp_path)
    assert keys[4:] == ["0", "0"], "else share-alike weights would pass for the shipped ones"


@pytest.mark.parametrize("with_openmoji", [True, False])
def test_the_licence_of_the_fourth_style_lies_beside_weights_trained_with_it(tmp_path, monkeypatch, with_openmoji):
    (tmp_path / "OPENMOJI.md").write_text("of an earlier build")
    monkeypatch.setattr(sources, "WITH_OPENMOJI", with_openmoji)
    sources.write_notice(tmp_path)
    assert (tmp_path / "OPENMOJI.md").exists() == with_openmoji
    if with_openmoji:
        text = (tmp_path / "OPENMOJI.md").read_text(encoding="utf-8")
        assert "CC BY-SA 4.0" in text
        assert "Warning: that licence is share-alike. Weights trained on these drawings" in text


def test_no_shipped_weight_is_of_the_fourth_style(emoji_folder):
    assert not list(emoji_folder.rglob("OPENMOJI.md"))
    assert sources.STYLES == ("noto", "twemoji", "fluent")
