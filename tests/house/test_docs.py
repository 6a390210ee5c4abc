"""The pages of docs/ that a contributor works from: their code runs, and the places that they name are there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCES = ("StoredStates", "OnLine", "NoisedData", "RenoisedSamples")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_stage_of_the_page_is_the_one_that_the_tests_add():
    toy = ROOT / "tests" / "pipeline" / "toy"
    typed, loop = blocks("add_a_stage.md")[:2]
    assert typed == (toy / "recipe" / "imitate.py").read_text(encoding="utf-8")
    assert loop == (toy / "stages" / "imitate.py").read_text(encoding="utf-8")


def test_the_reward_of_the_page_keeps_its_contract(tmp_path):
    (tmp_path / "reward_models").mkdir()
    (tmp_path / "reward_models" / "order.py").write_text(blocks("add_a_reward.md")[0], encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog beside green trees\n", encoding="utf-8")
    command = [sys.executable, "-m", "mlcm_rl", "rewards", "check", "order", "--prompts", "prompts.txt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n", encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode != 0
    assert "names none of red, green, blue" in " ".join((done.stdout + done.stderr).split())


def test_the_map_names_what_is_there():
    """Every file in a code span of find_your_way.md exists; of a name in brackets beside one, so does the name."""
    text = (DOCS / "find_your_way.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"`([^`]+)`", text)
    files = [span for span in spans if "/" in span and "<" not in span]
    assert len(files) > 20
    for file in files:
        assert any((folder / file).exists() for folder in (ROOT, ROOT / "mlcm_rl")), file
    for page in re.findall(r"\]\((\w+\.md)\)", text):
        assert (DOCS / page).is_file(), page
    names = [
        (file, name)
        for file, bracket in re.findall(r"`([\w/]+\.py)` \(((?:`[\w.]+`(?:, )?)+)\)", text)
        for name in re.findall(r"[\w.]+", bracket)
    ]
    names += [(file, name) for name, file in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", text)]
    names += [("stages/distill.py", "loss"), *(("data/training_points.py", name) for name in SOURCES)]
    assert len(names) > 10
    for file, name in names:
        tree = ast.parse((ROOT / "mlcm_rl" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert f"`{name}`" in text
        assert name.split(".")[0] in defined, (file, name)
