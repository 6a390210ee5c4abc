"""What most tests need: no hub, one thread, a tiny teacher on disk, and the small evaluation, run once for all."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import tiny
from evaluation_case import finished, place, report, tuned

__all__ = ["finished", "place", "report", "tuned"]

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore


def pytest_configure(config: pytest.Config) -> None:
    """Keep estimates and checksums beside pytest's own cache, for the processes that tests start too."""
    os.environ["MLCM_RL_ESTIMATES"] = str(config.cache.mkdir("mlcm_rl-estimates"))
    os.environ["MLCM_RL_CHECKSUMS"] = str(config.cache.mkdir("mlcm_rl-checksums"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("teacher") / "sdxl")
