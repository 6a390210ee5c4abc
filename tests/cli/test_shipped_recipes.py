"""`mlcm recipes`, recipes and launch files by name, and paths that begin with mlcm: and hold from any folder."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlcm_rl.cli.app import app
from mlcm_rl.cost.launches import read_launch
from mlcm_rl.recipe import paths, shipped
from mlcm_rl.recipe.file import load

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def mlcm(tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_list_has_every_recipe_and_says_what_it_needs(mlcm):
    rows = {row["name"]: row for row in json.loads(mlcm("recipes", "list", "--json").stdout)}
    assert set(rows) == {file.stem for file in RECIPES.glob("*.yaml")}
    assert rows["emoji_demo"]["stages"] == ["trajectories", "distill", "feedback", "evaluate"]
    assert all(row["what"] and row["needs"] for row in rows.values())
    assert "emoji_demo" in mlcm("recipes").stdout


def test_the_list_fits_80_columns_with_every_name_whole(mlcm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = mlcm("recipes").stdout.splitlines()
    names = [row.split()[0] for row in rows if row and row[0] != " "]
    assert {file.stem for file in [*RECIPES.glob("*.yaml"), *RECIPES.glob("launch/*.yaml")]} <= set(names)
    assert max(map(len, rows)) <= 80
    assert not any(row != row.rstrip() for row in rows)


def test_no_launch_file_has_the_name_of_a_recipe():
    assert not {file.stem for file in shipped.launch_files()} & {file.stem for file in shipped.recipes()}


def test_needs_are_of_recipes_that_are_there():
    needs = json.loads((RECIPES / "needs.json").read_text(encoding="utf-8"))
    assert list(needs) == sorted(file.stem for file in RECIPES.glob("*.yaml"))


def test_show_prints_the_file(mlcm):
    assert mlcm("recipes", "show", "emoji_demo").stdout == (RECIPES / "emoji_demo.yaml").read_text(encoding="utf-8")


def test_an_unknown_name_is_refused_with_the_nearest(mlcm):
    result = mlcm("recipes", "show", "emoji_dmo")
    assert result.exit_code == 2
    assert "did you mean emoji_demo?" in " ".join(result.stderr.replace("│", " ").split())


def test_a_copy_for_a_model_of_your_own_names_no_prompts_of_ours(mlcm, tmp_path):
    copied = mlcm("recipes", "copy", "my_finetune")
    assert (copied.exit_code, copied.stdout) == (0, "my_finetune.yaml\n")
    assert "then `mlcm plan my_finetune.yaml` says what it costs" in copied.stderr
    assert "mlcm:" not in (tmp_path / "my_finetune.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [file.stem for file in RECIPES.glob("*.yaml")])
def test_a_copy_is_the_same_recipe_from_any_folder(mlcm, tmp_path, name):
    result = mlcm("recipes", "copy", name, "mine")
    assert result.exit_code == 0, result.output
    copy, original = (tmp_path / "mine" / f"{name}.yaml"), RECIPES / f"{name}.yaml"
    changed = [(a, b) for a, b in zip(lines(copy), lines(original), strict=True) if a != b]
    assert all(a.replace("mlcm:", "") == b for a, b in changed if "$schema" not in a)
    of_copy, of_original = (
        list(paths.paths_in(paths.resolved(load(file), paths.Folders(file.parent, tmp_path))[0]))
        for file in (copy, original)
    )
    for one, other in zip(of_copy, of_original, strict=True):
        path = Path(other[1])
        if path.is_relative_to(RECIPES) and path.exists():  # else it is the user's, or made first, beside the recipe
            assert one == other
    assert mlcm("recipes", "copy", name, "mine").exit_code == 2  # a second time it would lose changes


def test_a_launch_file_is_copied_with_its_script_and_names_the_copy(mlcm, tmp_path):
    assert mlcm("recipes", "copy", "two_nodes", "mine").stdout.split() == [
        "mine/two_nodes.yaml",
        "mine/two_nodes.sbatch",
    ]
    texts = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "mine").iterdir()}
    assert "--launch mine/two_nodes.yaml --machine-rank 0" in texts["two_nodes.yaml"]
    assert "${LAUNCH:-mine/two_nodes.yaml}" in texts["two_nodes.sbatch"]
    assert mlcm("recipes", "copy", "two_nodes", "mine").exit_code == 2


def test_the_copy_of_a_launch_file_is_one(mlcm, tmp_path):
    assert mlcm("recipes", "copy", "ddp").exit_code == 0
    assert read_launch(tmp_path / "ddp.yaml") == read_launch(RECIPES / "launch" / "ddp.yaml")


def test_a_copy_replaces_no_link(mlcm, tmp_path):
    (tmp_path / "emoji_demo.yaml").symlink_to("elsewhere.yaml")
    assert mlcm("recipes", "copy", "emoji_demo").exit_code == 2
    assert (tmp_path / "emoji_demo.yaml").is_symlink()


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def test_a_recipe_is_named_without_its_folder(mlcm):
    assert mlcm("validate", "emoji_demo").stdout == f"ok  {RECIPES / 'emoji_demo.yaml'}\n"


def test_a_file_of_the_name_goes_before_the_shipped_recipe(mlcm, tmp_path):
    (tmp_path / "emoji_demo").write_text("name: mine\n", encoding="utf-8")
    assert "emoji_demo: " in mlcm("validate", "emoji_demo").stdout


def test_a_folder_of_the_name_does_not(mlcm, tmp_path):
    (tmp_path / "emoji_demo").mkdir()
    assert mlcm("validate", "emoji_demo").stdout == f"ok  {RECIPES / 'emoji_demo.yaml'}\n"


def test_a_launch_file_is_named_without_its_folder(mlcm):
    assert shipped.launch_file("zero2") == RECIPES / "launch" / "zero2.yaml"
    assert shipped.launch_file("../sdxl_mlcm") is None
    result = mlcm("plan", "emoji_demo", "--launch", "zero5")
    assert result.exit_code == 2
    assert "launch files that come with mlcm_rl are cpu2, ddp," in " ".join(result.stderr.replace("│", " ").split())


def test_a_shipped_file_that_is_not_there_is_said_with_the_folder(mlcm, tmp_path):
    mlcm("recipes", "copy", "emoji_demo")
    file = tmp_path / "emoji_demo.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("mlcm:emoji/judge", "mlcm:emoji/juge"), encoding="utf-8")
    result = mlcm("validate", "emoji_demo.yaml")
    assert result.exit_code == 2
    assert "no such folder: mlcm:emoji/juge" in result.stdout
    assert f"mlcm: is the folder of recipes that comes with mlcm_rl, here {RECIPES}" in result.stdout
