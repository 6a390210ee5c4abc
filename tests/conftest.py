"""What most tests need: no hub, one thread, a tiny teacher on disk."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import runs
import tiny

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore


@pytest.fixture(scope="session", autouse=True)
def memory_meter() -> Iterator[Callable | None]:
    """The pipeline's memory meter, which runs of this process are without unless a test puts it back."""
    pipeline = sys.modules.get("mlcm_rl.pipeline")  # not imported for tests that run nothing
    with pytest.MonkeyPatch.context() as patched:
        if pipeline:
            found = pipeline._memory_meter
            patched.setattr(pipeline, "_memory_meter", runs.no_meter)
        yield found if pipeline else None


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("teacher") / "sdxl")
