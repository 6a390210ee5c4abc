"""What a reward model is made of, as far as its files say: found without importing any of them."""

import json

from mlcm_rl.rewards.source import source_hashes


def test_a_reward_of_another_distribution_is_hashed_and_not_imported(installed):
    name = installed("cool", "raise ImportError('only its user needs this')\n")
    (hashed,) = source_hashes(name).items()
    assert hashed[0] == "cool_reward"


def test_every_shape_of_import_from_the_own_package_is_followed(tmp_path, monkeypatch):
    package = tmp_path / "plugin"
    package.mkdir()
    lines = ["from . import a", "from .b import x", "import plugin.c", "from plugin import d", "import json, os.path"]
    (package / "__init__.py").write_text("")
    (package / "reward.py").write_text("\n".join(lines))
    (package / "b.py").write_text("def late():\n    from .. import outside\n    from .e import y\n")
    (package / "c.py").write_text("this is no Python")
    for name in ("a", "d", "e", "unused"):
        (package / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("mlcm_rl.rewards.source._module_of", lambda name: "plugin.reward")
    assert set(source_hashes("any")) == {"plugin", *(f"plugin.{name}" for name in ("reward", *"abcde"))}


def test_shipped_weights_count_under_the_module_that_reads_them():
    assert {"reward_models._efficientnet_lite.safetensors", "reward_models.emoji_alignment.safetensors"} <= set(
        source_hashes("emoji_alignment")
    )
    assert source_hashes("no_such_reward") == {}


def test_weights_that_nobody_could_pin_count_by_what_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    without = source_hashes("mps")
    place = tmp_path / "rewards" / "mps_overall"
    place.mkdir(parents=True)
    (place / "origin.json").write_text(json.dumps({"fetched_sha256": "0123"}))
    assert source_hashes("mps") == without | {"mps_overall": "0123"}
    assert "clip_l_14" not in without  # pinned in the source
