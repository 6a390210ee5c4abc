"""Pictures in the trackers: TensorBoard's read back from its file, wandb's and trackio's offline where they are."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
from mlcm_rl import pipeline
from mlcm_rl.recipe import Samples
from mlcm_rl.training import loop, trackers

PICTURE = Image.effect_noise((40, 24), 90).convert("RGB")


def runtime(folder: Path, *names: str) -> loop.Runtime:
    stage = runs.distill()
    return loop.Runtime(runs.recipe(folder / "teacher", folder, [stage], trackers=list(names)), stage, folder)


def pictures_of(folder: Path) -> dict[str, list]:
    """Return the pictures of TensorBoard's files under `folder`, by name: (step, picture) in order."""
    read = EventAccumulator(str(folder), size_guidance={"images": 0})
    read.Reload()
    return {
        tag: [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in read.Images(tag)]
        for tag in read.Tags()["images"]
    }


def close(rt: loop.Runtime) -> None:
    for tracker in rt.accelerator.trackers:
        tracker.finish()


def test_tensorboard_has_the_very_picture_at_its_step(tmp_path):
    rt = runtime(tmp_path, "tensorboard")
    rt.log_picture(4, "samples", lambda picture: picture, PICTURE)
    rt.log(4, loss=1.0)
    close(rt)
    ((step, picture),) = pictures_of(tmp_path / "tensorboard")["samples"]
    assert step == 5
    assert np.array_equal(np.asarray(picture), np.asarray(PICTURE))


def test_a_large_sheet_is_sent_smaller(tmp_path):
    rt = runtime(tmp_path, "tensorboard")
    rt.log_picture(0, "samples", lambda: Image.new("RGB", (2 * trackers.MAX_SIDE, 100), (9, 200, 30)))
    close(rt)
    ((_, picture),) = pictures_of(tmp_path / "tensorboard")["samples"]
    assert picture.size == (trackers.MAX_SIDE, 50)
    assert picture.getpixel((5, 5)) == (9, 200, 30)


def test_nothing_is_drawn_without_a_tracker(tmp_path):
    runtime(tmp_path).log_picture(0, "samples", lambda: pytest.fail("it was drawn"))


class Failing(GeneralTracker):
    """A tracker that raises at its start, or at its second record."""

    requires_logging_directory = False
    name = "failing"

    def __init__(self, project: str, error: BaseException, at_start: bool = False):
        super().__init__()
        self.error, self.at_start, self.num_records = error, at_start, 0

    @property
    def tracker(self):
        return None

    def start(self):
        if self.at_start:
            raise self.error

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.num_records += 1
        if self.num_records == 2:
            raise self.error


# wandb leaves the process by itself where it is not logged in
ERRORS = pytest.mark.parametrize("error", [ConnectionError("no way\nand a trace"), SystemExit("no way")], ids=repr)


@ERRORS
def test_a_tracker_that_raises_is_off_and_the_others_go_on(tmp_path, capsys, error):
    rt = runtime(tmp_path, "tensorboard")
    failing = Failing("project", error)
    rt.accelerator.trackers.insert(0, failing)
    for step in range(3):
        rt.log(step, loss=float(step))
    line = f"tracker failing: {type(error).__name__}: no way: it is off for the rest of this stage, which goes on"
    assert capsys.readouterr().out.count(line) == 1
    assert failing.num_records == 2
    assert [tracker.name for tracker in rt.accelerator.trackers] == ["tensorboard"]
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    close(rt)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 0.0), (2, 1.0), (3, 2.0)]


@ERRORS
def test_a_tracker_that_does_not_start_stops_no_stage(tmp_path, capsys, error):
    rt = runtime(tmp_path, "tensorboard")
    close(rt)
    rt.accelerator.log_with = [Failing("project", error, at_start=True), *rt.accelerator.log_with]
    trackers.start(rt.accelerator, "project", {"seed": 1}, {})
    assert f"{type(error).__name__}: no way: it is off" in capsys.readouterr().out
    assert [tracker.name for tracker in rt.accelerator.trackers] == ["tensorboard"]
    close(rt)


def test_wandb_has_the_picture_the_settings_and_the_name_of_the_stage(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "distill-0123").mkdir()
    rt = runtime(tmp_path / "distill-0123", "wandb")
    (tracker,) = rt.accelerator.trackers
    rt.log_picture(4, "samples", lambda: PICTURE)
    assert (tracker.run.name, tracker.run.config["stages.0.learning_rate"]) == ("distill-0123", 1e-3)
    close(rt)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/samples_*.png")
    with Image.open(file) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(PICTURE))


def test_trackio_has_the_picture_and_the_name_of_the_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before it is imported
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    (tmp_path / "distill-0123").mkdir()
    rt = runtime(tmp_path / "distill-0123", "trackio")
    (tracker,) = rt.accelerator.trackers
    rt.log_picture(4, "samples", lambda: PICTURE)
    assert tracker.run.name == "distill-0123"
    close(rt)
    files = [path for path in (tmp_path / "trackio").rglob("*.png") if os.sep + "media" + os.sep in str(path)]
    (file,) = files
    with Image.open(file) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(PICTURE))


@pytest.mark.slow
def test_a_tuning_stage_sends_its_samples_and_the_guards_curves(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[2]), runs.tuning("feedback", prompts)]
    samples = Samples(prompts=["a cat", "熊猫"], sampling_steps=[1, 2])
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages, samples=samples, trackers=["tensorboard"])
    *_, distilled, tuned = [stage.folder for stage in pipeline.run(recipe)]
    (found,) = pictures_of(distilled / "tensorboard").values()
    assert [step for step, _ in found] == [2]
    found = pictures_of(tuned / "tensorboard")
    assert {tag: [step for step, _ in events] for tag, events in found.items()} == {
        "samples": [2],
        "guard": [1, 2],
    }
    (_, grid) = found["samples"][0]
    with Image.open(tuned / "samples" / "step-000002.png") as written:
        assert np.array_equal(np.asarray(grid), np.asarray(written))
    (_, curves) = found["guard"][1]
    colours = {colour for _, colour in curves.getcolors(10**6)}
    assert {(0x2F, 0x7E, 0xD8), (0xD9, 0x70, 0x2B)} <= colours  # a line each for trained and held out
