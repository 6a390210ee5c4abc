"""Runs in processes forked off one that has imported everything, so that none costs a start-up."""

import json
import multiprocessing
from pathlib import Path

import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.recipe import Recipe
from mlcm_rl.report import page

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked", *(f"mlcm_rl.stages.{kind}" for kind in (*runs.KINDS, "train_reward"))])


def prepare() -> None:
    """Make this process like that of a test, of one thread; no plots are drawn: they take longest."""
    torch.set_num_threads(1)
    page.render = lambda report, folder: json.dumps(report.headline.as_json())


def run(recipe: str) -> None:
    """Run a recipe (JSON) in this process."""
    prepare()
    pipeline.run(Recipe.model_validate_json(recipe))


def pairs(run_folder: Path, prompts: Path, out: Path) -> None:
    """`mlcm pairs --reward brightness` in this process."""
    prepare()
    finished_runs.pairs(run_folder, prompts, "brightness", out, None, 2, 1, 0.0, 0, 4)


def export(run_folder: Path, out: Path) -> None:
    """`mlcm export` in this process; a folder that is there already is done: it appears whole."""
    prepare()
    if not out.exists():
        finished_runs.export(run_folder, out)
