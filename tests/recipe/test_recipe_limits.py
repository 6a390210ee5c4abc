"""Numbers and files that no recipe has are refused before anything is made of them."""

import os
import socket
from pathlib import Path

import pytest
from ruamel.yaml.composer import Composer

from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.schema import json_schema
from mlcm_rl.recipe.tree import MAX_NODES, RecipeError

UNCOUNTED = {"seed"}  # hashed, never counted up to


def messages(text: str, tmp_path: Path, root: Path | None = None) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load(path, root=root)
    return [str(problem) for problem in error.value.problems]


def test_every_count_of_a_recipe_ends_somewhere():
    schema = json_schema()
    keys = [(kind, name, key) for kind, model in schema["$defs"].items() for name, key in model["properties"].items()]
    endless = []
    for kind, name, key in keys:
        forms = key.get("anyOf", [key])
        for one in [*forms, *(form.get("items", {}) for form in forms)]:
            bounded = "maximum" in one or "enum" in one or "const" in one
            if one.get("type") == "integer" and not bounded and name not in UNCOUNTED:
                endless.append(f"{kind}.{name}")
    assert endless == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_trajectories: 1000000000000", "above 0 and at most 10,000,000, found the number 1000000000000"),
        ("num_trajectories: 4\n    num_held_out: 1000000000000", "from 0 to 10,000,000, found"),
        ("num_trajectories: 10000000\n    shard_size: 1", "shard_size 1 would make more than a million files"),
    ],
)
def test_a_store_of_too_many_is_refused_in_words(tmp_path, setting, message):
    text = "name: x\nteacher: {path: x, family: sd}\nstages:\n  - kind: trajectories\n    prompts: p.txt\n    "
    (problem,) = messages(text + setting, tmp_path)
    assert message in problem


@pytest.mark.parametrize("form", ["lines", "flow", "list"])
def test_a_file_of_more_values_than_a_recipe_has_is_left_early(tmp_path, monkeypatch, form):
    composed = []
    compose = Composer.compose_node
    monkeypatch.setattr(Composer, "compose_node", lambda *arguments: composed.append(1) or compose(*arguments))
    names = [f"k{i}" for i in range(60_000)]
    lines = "\n".join(f"{name}: 1" for name in names)
    text = {"lines": lines, "flow": "x: {" + ": 1, ".join(names) + ": 1}", "list": "x: [" + ", ".join(names) + "]"}
    assert messages(text[form], tmp_path) == [
        f"{tmp_path / 'recipe.yaml'}:1:1: more than {MAX_NODES:,} values: no recipe is so long"
    ]
    assert len(composed) <= 2 * MAX_NODES


# ---- pipes and devices ----


def test_a_pipe_a_socket_and_a_device_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket.yaml"))
        for path in (tmp_path / "pipe.yaml", tmp_path / "socket.yaml", Path("/dev/zero")):
            with pytest.raises(RecipeError, match="a pipe, a socket or a device, where a file"):
                load(path)


def test_a_setting_of_a_reward_that_names_a_pipe_or_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero"):
        reward = f"{{name: brightness, settings: {{file: {name}}}}}"
        stage = f"stages:\n  - {{kind: evaluate, prompts: p.txt, rewards: [{reward}]}}\n"
        problems = messages(f"name: x\nteacher: {{path: x, family: sd}}\n{stage}", tmp_path, root=tmp_path)
        assert any("settings.file" in one and "a pipe, a socket or a device" in one for one in problems)
