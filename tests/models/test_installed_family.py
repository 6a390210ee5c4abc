"""A family of another distribution, as docs/add_a_family.md shows it: found by its entry point, and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.flow import FlowBase
from mlcm_rl.models.unet import UNetBase
from mlcm_rl.recipe.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FAMILY = """
from mlcm_rl.models.families.sd import Family as StableDiffusion


class Family(StableDiffusion):
    family = "my_family"
"""
METADATA = "Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder for sys.path as pip leaves one, with the files of the page."""
    page = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
    (layout,) = re.findall(r"```python\n(# my_package/layout\.py.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"```toml\n\[project\.entry-points\.\"(mlcm_rl\.families)\"\]\n(.*?)\n```", page, re.DOTALL)
    site = tmp_path_factory.mktemp("site")
    package, info = site / "my_package", site / "my_package-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layout.py").write_text(layout)
    (package / "family.py").write_text(FAMILY)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1].replace(chr(34), '')}\n")
    return site


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe whose teacher is of the family of the page."""
    whole = runs.whole(tiny.sd(tmp_path / "teacher"), tmp_path, "sd", num_segments=[1])
    path = tmp_path / "mine.yaml"
    path.write_text(whole.model_dump_json().replace('"family":"sd"', '"family":"my_family"'))
    return path


def mlcm(site: Path, *arguments: object) -> subprocess.CompletedProcess:
    place = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    command = [sys.executable, "-m", "mlcm_rl", *map(str, arguments)]
    return subprocess.run(command, env=place, capture_output=True, text=True)


@pytest.mark.slow
def test_a_recipe_names_it_and_every_stage_runs(site, recipe, tmp_path):
    assert '"my_family"' in mlcm(site, "schema").stdout
    done = mlcm(site, "run", recipe)
    assert done.returncode == 0, done.stderr
    exported = mlcm(site, "export", tmp_path / "runs" / "small", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert "my_family" in (tmp_path / "out" / "student.json").read_text()


def test_without_the_distribution_the_known_families_are_told(recipe, tmp_path):
    refused = mlcm(tmp_path, "validate", recipe)
    assert refused.returncode == 2
    assert f"expected one of {', '.join(FAMILIES)}, found the text 'my_family'" in " ".join(refused.stdout.split())
    assert "has an entry point of mlcm_rl.families" in " ".join(refused.stdout.split())


@pytest.mark.parametrize(
    ("file", "old", "new", "command", "message"),
    [
        ("layout.py", "my_package.family:F", "my_package.famly:F", "validate", "names no class as module:name"),
        ("layout.py", "my_package.family:F", "my_package.family.F", "validate", "names no class as module:name"),
        ("layout.py", "LAYOUT =", "OUTLAY =", "validate", "cannot be loaded: AttributeError"),
        ("layout.py", "LAYOUT = Layout(", "LAYOUT = dict(", "validate", "is not a mlcm_rl.recipe.families.Layout"),
        pytest.param(
            "layout.py",
            "family:Family",
            "family:Famly",
            "plan",
            "my_package.family:Famly cannot be loaded: Attribute",
            marks=pytest.mark.slow,
        ),
        ("family.py", '"my_family"', '"sd"', "plan", "my_package.family:Family has family 'sd', expected 'my_family'"),
        pytest.param(
            "family.py",
            "(StableDiffusion)",
            "",
            "plan",
            "is no subclass of mlcm_rl.models.base.Base",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_slip_in_the_distribution_is_one_line_that_names_the_entry_point(
    site, recipe, tmp_path, file, old, new, command, message
):
    shutil.copytree(site, tmp_path / "site")
    broken = tmp_path / "site" / "my_package" / file
    assert old in broken.read_text()
    broken.write_text(broken.read_text().replace(old, new))
    refused = mlcm(tmp_path / "site", command, recipe)
    told = " ".join((refused.stdout + refused.stderr).split())
    assert refused.returncode in (1, 2)
    assert "the entry point my_family = my_package.layout:LAYOUT of mlcm_rl.families" in told
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize("base", [Base, UNetBase, FlowBase])
def test_the_page_names_all_that_is_left_to_write(base):
    page = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{base.__name__}` \|.*\| (.*) \|$", page, re.MULTILINE)
    attributes = {name for name in Base.__annotations__ if not hasattr(base, name)}
    assert set(re.findall(r"`(\w+)`", row)) == attributes | base.__abstractmethods__


def test_a_copy_of_a_family_keeps_the_checks_of_its_teacher(site, recipe, tmp_path):
    config = tmp_path / "teacher" / "unet" / "config.json"
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    changes = sizes | {"projection_class_embeddings_input_dim": 64}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    refused = mlcm(site, "validate", recipe)
    assert refused.returncode == 2
    assert "addition_embed_type: expected none, found text_time" in " ".join(refused.stdout.split())
