"""What most tests need: no hub, one thread, a tiny teacher on disk."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("teacher") / "sdxl")
