"""A family of another distribution, as docs/add_a_family.md shows it: found by its entry point, and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runs
import tiny

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


def mlcm(site: Path, *arguments: object) -> subprocess.CompletedProcess:
    place = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    command = [sys.executable, "-m", "mlcm_rl", *map(str, arguments)]
    return subprocess.run(command, env=place, capture_output=True, text=True)


def test_a_recipe_names_it_and_every_stage_runs(site, tmp_path):
    recipe = runs.whole(tiny.sd(tmp_path / "teacher"), tmp_path, "sd", num_segments=[1])
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.model_dump_json().replace('"family":"sd"', '"family":"my_family"'))
    assert '"my_family"' in mlcm(site, "schema").stdout
    done = mlcm(site, "run", path)
    assert done.returncode == 0, done.stderr
    exported = mlcm(site, "export", tmp_path / "runs" / "small", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert "my_family" in (tmp_path / "out" / "student.json").read_text()


def test_without_the_distribution_the_known_families_are_told(site, tmp_path):
    recipe = runs.whole(tiny.sd(tmp_path / "teacher"), tmp_path, "sd", num_segments=[1])
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.model_dump_json().replace('"family":"sd"', '"family":"my_family"'))
    refused = mlcm(tmp_path, "validate", path)
    assert refused.returncode == 2
    assert "expected one of sdxl, sd, sd3, found the text 'my_family'" in refused.stdout
