"""A distribution of somebody else that registers a reward model, installed by hand for one test."""

import sys

import pytest


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs `source` as module `<name>_reward`, its class `Reward` registered as `name`."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(name, source):
        site.mkdir(exist_ok=True)
        (site / f"{name}_reward.py").write_bytes(source if isinstance(source, bytes) else source.encode())
        info = site / f"{name}_reward-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-reward\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mlcm_rl.reward_models]\n{name} = {name}_reward:Reward\n")
        monkeypatch.delitem(sys.modules, f"{name}_reward", raising=False)
        return name

    return install
