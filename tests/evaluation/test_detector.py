"""GenEval's accuracy by tiny detectors of random weights in the published layouts, and by planted ones."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    ResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
)

import evaluation_case
import tiny
from evaluation_case import write_clip
from mlcm_rl.data.geneval import COLOURS, Detection, Task, Wanted
from mlcm_rl.evaluation import metrics
from mlcm_rl.evaluation.detector import Detector, GenEval, crop
from mlcm_rl.pipeline import preflight
from mlcm_rl.recipe import Evaluate

LABELS = {0: "N/A", 1: "cat", 2: "mouse", 3: "dog"}
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]}
IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def write_detector(folder, kind):
    """A detector of random weights with its processor's settings; returns `folder`."""
    small = {"id2label": LABELS, "label2id": {name: place for place, name in LABELS.items()}}
    torch.manual_seed(1)
    if kind == "yolos":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        more = {"image_size": [32, 48], "patch_size": 8, "num_detection_tokens": 6}
        YolosForObjectDetection(YolosConfig(**sizes, **more, **small)).save_pretrained(folder)
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
        backbone = ResNetConfig(**sizes, out_features=["stage2"])
        layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        layers |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "d_model": 16}
        config = DetrConfig(use_timm_backbone=False, backbone_config=backbone, **layers, **heads, **small)
        DetrForObjectDetection(config).save_pretrained(folder)
    settings = {"image_processor_type": f"{kind.capitalize()}ImageProcessor", "do_resize": True, **STATISTICS}
    settings |= {"size": {"shortest_edge": 32, "longest_edge": 64}, "do_pad": True, "format": "coco_detection"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_a_closed_detector_sees_its_own_most_likely_classes_and_boxes(tmp_path, kind):
    finder = Detector(write_detector(tmp_path / "detector", kind), {"cat", "computer mouse"}, "cpu")
    mean, deviation = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("image_mean", "image_std"))
    eight_bits = (IMAGES * 255).round() / 255
    with torch.no_grad():  # the pictures have the detector's size: it only shifts and scales
        outputs = finder.model(pixel_values=(eight_bits - mean) / deviation)
    chances, classes = outputs.logits.softmax(-1)[..., :-1].max(-1)  # the last class is that of nothing
    found = finder.detect(IMAGES, 0.0)
    assert [len(one) for one in found] == [6, 6]
    names = {0: "N/A", 1: "cat", 2: "computer mouse", 3: "dog"}  # by GenEval's names
    for i, one in enumerate(found):
        for j, detection in enumerate(one):
            x, y, width, height = outputs.pred_boxes[i, j].tolist()
            expected = [48 * (x - width / 2), 32 * (y - height / 2), 48 * (x + width / 2), 32 * (y + height / 2)]
            assert detection.box == pytest.approx(expected, abs=0.05)
            assert detection.confidence == pytest.approx(chances[i, j].item(), abs=1e-3)
            assert detection.name == names[classes[i, j].item()]
    middle = chances[0].median().item()
    assert len(finder.detect(IMAGES[:1], middle)[0]) == (chances[0] > middle).sum() < 6


def test_an_open_detector_looks_for_the_classes_that_are_asked_for(tmp_path):
    entries = {word: place + 1 for word, place in tiny.tokenizer().get_vocab().items()}  # 0 stands for no query
    words = CLIPTokenizer({"nothing": 0, **entries}, [], model_max_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 16}
    torch.manual_seed(1)
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    OwlViTForObjectDetection(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    settings = {"image_processor_type": "OwlViTImageProcessor", "processor_class": "OwlViTProcessor", **STATISTICS}
    settings |= {"size": {"height": 32, "width": 32}, "do_resize": True, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    finder = Detector(tmp_path, {"zebra", "bench"}, "cpu")
    found = finder.detect(IMAGES[..., :32], 0.0)
    assert [len(one) for one in found] == [16, 16]  # a box a patch
    assert {detection.name for one in found for detection in one} <= {"bench", "zebra"}
    assert all(0 < detection.confidence <= 1 for detection in found[0])


def test_other_networks_and_classes_that_it_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not know 1 classes, for example 'zebra'"):
        Detector(write_detector(tmp_path / "detector", "yolos"), {"cat", "zebra"}, "cpu")
    with pytest.raises(ValueError, match="is of the kind 'clip'; read are conditional_detr"):
        Detector(write_clip(tmp_path / "clip"), {"cat"}, "cpu")


def damage(folder, change):
    """Let `change` replace the weights in a folder; returns the folder."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


DAMAGES = [
    (lambda weights: dict(list(weights.items())[1:]), "1 weights are not in the files of .*: fetch them again"),
    (lambda weights: {name: value * math.nan for name, value in weights.items()}, "is not made of finite numbers"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES, ids=["missing", "nan"])
def test_weights_that_would_be_drawn_at_random_or_are_nan_are_refused(tmp_path, change, message):
    """Of NaN nothing is seen, so that every picture would be wrong; CLIP's scores would be random or NaN."""
    with pytest.raises(ValueError, match=f"detector: .*{message}"):
        Detector(damage(write_detector(tmp_path / "detector", "yolos"), change), {"cat"}, "cpu")
    with pytest.raises(ValueError, match=f"clip: .*{message}"):
        metrics.ClipScore(damage(write_clip(tmp_path / "clip"), change), "cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_file_that_is_gone_or_cut_is_refused_with_the_key(tmp_path, name):
    folder = write_detector(tmp_path / "detector", "yolos")
    content = (folder / name).read_bytes()
    for fault in (lambda: (folder / name).write_bytes(content[: len(content) // 2]), (folder / name).unlink):
        fault()
        with pytest.raises(ValueError, match=r"detector: .* could not be loaded: "):
            Detector(folder, {"cat"}, "cpu")


class Planted:
    """A detector that sees a cat on the left of each picture and, where the picture is bright, a dog at the right."""

    def detect(self, images, confidence):
        side = images.shape[-1]
        cat = Detection("cat", 0.5, (0.0, 0.0, side / 4, side / 4))
        dog = Detection("dog", 0.95, (3 * side / 4, 0.0, side, side / 4))
        return [[cat, dog] if image.mean() > 0.5 else [cat] for image in images]


TASKS = [
    Task("single_object", (Wanted("cat", 1),)),
    Task("counting", (Wanted("cat", 1),)),  # of which none is sure enough
    Task("two_object", (Wanted("cat", 1), Wanted("dog", 1))),
    Task("two_object", (Wanted("cat", 1), Wanted("dog", 1))),
    Task("two_object", (Wanted("dog", 1), Wanted("cat", 1))),
]


def test_the_score_is_the_mean_over_tasks_and_each_task_has_its_own():
    accuracy = GenEval(Planted(), None, TASKS, (0.3, 0.9), "p.jsonl")
    bright, dark = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    images, places = torch.stack([dark, dark, bright, dark, dark, bright]), [0, 1, 2, 3, 4, 4]
    assert accuracy.read(images, places).tolist() == [1, 0, 1, 0, 0, 1]
    right = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    values = accuracy.metrics(right)
    assert values["geneval"].mean().item() == pytest.approx((1 + 0 + 0.5) / 3)
    assert values["geneval@two_object"].nanmean().item() == pytest.approx(0.5)
    assert values["geneval@counting"].isnan().tolist() == [True, False, True, True, True]
    assert list(values) == ["geneval", "geneval@single_object", "geneval@counting", "geneval@two_object"]


def test_a_colour_is_the_nearest_text_of_the_crop(tmp_path):
    clip = metrics.ClipScore(write_clip(tmp_path / "clip"), "cpu")
    accuracy = GenEval(Planted(), clip, TASKS, (0.3, 0.9), "p.jsonl")
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(3))
    boxes = [(2.4, 3.0, 30.0, 21.6), (0.0, 0.0, 40.0, 40.0)]
    templates = ("a photo of a {} cat", "a photo of a {}-colored cat", "a photo of a {} object")
    texts = torch.stack(
        [sum(clip.text_features([text.format(colour)])[0] for text in templates) / 3 for colour in COLOURS]
    )
    scores = torch.cat([clip.image_features([part[None]]) for part in (image[:, 3:22, 2:30], image)]) @ texts.T
    expected = [COLOURS[i] for i in (scores / texts.norm(dim=1)).argmax(1).tolist()]
    assert accuracy.colours_of(image, "cat", boxes) == expected
    assert crop(image, (39.9, -3.0, 39.95, 0.2)).shape == (3, 1, 1)  # a pixel at least


def test_colours_need_a_clip():
    with pytest.raises(ValueError, match=r"p\.jsonl: has prompts that ask for a colour, which needs clip"):
        GenEval(Planted(), None, [Task("colors", (Wanted("cat", 1, "red"),))], (0.3, 0.9), "p.jsonl")


def test_an_evaluation_has_genevals_score_and_its_tasks(place, tmp_path, monkeypatch):
    lines = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    few = {"sampling_steps": [4], "teacher_steps": [2], "num_prompts": 3, "images_per_prompt": 1, "also": []}
    networks = {
        "detector": str(write_detector(tmp_path / "detector", "yolos")),
        "clip": str(write_clip(tmp_path / "clip")),
        "confidences": [0.0, 0.3],
    }
    report = evaluation_case.run(
        place, tmp_path / "run", **few, **networks, prompts=str(tmp_path / "p.jsonl"), judge=None, rewards=[]
    )
    for row in report["rows"]:
        tasks = {key: one for key, one in row["metrics"].items() if key.startswith("geneval")}
        assert list(tasks) == ["geneval", "geneval@single_object", "geneval@counting", "geneval@colors"]
        assert all(tasks[key]["mean"] in (0.0, 1.0) for key in tasks if "@" in key)
        assert tasks["geneval"]["mean"] == pytest.approx(sum(tasks[key]["mean"] for key in tasks if "@" in key) / 3)
    assert list(report["networks"]) == ["clip", "detector"]
    assert "geneval" in [check["metric"] for check in report["headline"]["checks"]]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Right pictures, by GenEval&#39;s task" in page
    assert "geneval@colors" not in page


def test_a_folder_that_is_no_detector_is_refused_before_any_stage_runs(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"})
    )
    folder = write_clip(tmp_path / "clip")
    stage = Evaluate(prompts=str(tmp_path / "p.jsonl"), num_prompts=1, detector=str(folder))
    ((key, error),) = preflight.problems(stage)
    assert key == "detector"
    assert "is of the kind 'clip'" in str(error)
    (folder / "config.json").write_text("[]")
    ((key, error),) = preflight.problems(stage)
    assert (key, str(error)) == ("detector", f"{folder / 'config.json'} is damaged: it does not hold a JSON object")
