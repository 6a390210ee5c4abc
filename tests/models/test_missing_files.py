"""Every file of every family's folder that loading needs: without it, a line says which, where and what to do."""

import json
import re

import pytest

from mlcm_rl.recipe import teacher_check, teacher_files
from mlcm_rl.recipe.families import layout_of

UNUSED = {"generation_config.json"}  # of language models; nothing is generated
TEMPLATE = "chat_template.jinja"


def test_without_any_file_a_line_names_it_and_says_what_to_do(case, folder, tmp_path):
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        needed = path.name not in UNUSED and (path.name != TEMPLATE or layout_of(case.family).reads_chats)
        path.rename(tmp_path / "aside")
        lines = teacher_check.problems(folder, case.family)
        (tmp_path / "aside").rename(path)
        assert len(lines) == needed, (path, lines)
        for line in lines:
            name = "" if path.parent == folder else f"{path.parent.name}/"
            assert re.match(rf"{name}\S+: missing.*: download it too", line), line
            assert path.name in line
    assert teacher_check.problems(folder, case.family) == []


def test_without_a_folder_a_line_names_it(case, folder, tmp_path):
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        path.rename(tmp_path / "aside")
        assert teacher_check.problems(folder, case.family) == [
            f"model_index.json: {path.name}: no such folder: download {path.name}/ too"
        ]
        (tmp_path / "aside").rename(path)


@pytest.mark.parametrize("case", ["z_image"], indirect=True)
def test_a_template_in_the_tokenizers_configuration_serves_too(case, tmp_path):
    folder = case.write(tmp_path / "teacher")
    template, config = (folder / "tokenizer" / name for name in (TEMPLATE, "tokenizer_config.json"))
    content = json.loads(config.read_text(encoding="utf-8")) | {"chat_template": template.read_text(encoding="utf-8")}
    template.unlink()
    config.write_text(json.dumps(content), encoding="utf-8")
    assert teacher_check.problems(folder, case.family) == []
    case.load(folder).encode_prompts(["a cat"])


@pytest.mark.parametrize("case", ["pixart_sigma"], indirect=True)
def test_a_vocabulary_of_sentencepiece_needs_sentencepiece(case, folder, monkeypatch):
    """Where it is not installed, transformers asks for tiktoken, which reads no such file."""
    path = folder / "tokenizer" / "tokenizer.json"
    monkeypatch.setattr(teacher_files, "find_spec", lambda name: None)
    assert teacher_check.problems(folder, case.family) == []
    other = path.rename(path.with_name("spiece.model"))
    line = "tokenizer/spiece.model: read by sentencepiece, which is not installed: pip install sentencepiece"
    assert teacher_check.problems(folder, case.family) == [line]
    other.rename(path)
