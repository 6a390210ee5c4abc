"""The symptoms of docs/troubleshooting.md are messages of the code."""

import ast
import re

import pages

PAGE = pages.ROOT / "docs" / "troubleshooting.md"
OF_OTHERS = {"mlcm: command not found", "feedback", "trajectories", "evaluate", "distill", "guidance_scale", "zero3"}
GAP = "\N{HORIZONTAL ELLIPSIS}"


def messages() -> list[str]:
    """Return the texts of the package in lower case, with GAP where a value goes."""
    found = []
    for file in (pages.ROOT / "mlcm_rl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else GAP for one in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(text.replace("`", "").split()).lower() for text in found]


def symptoms() -> list[str]:
    """Return the code spans in the first column of the page's tables that quote a message."""
    rows = re.findall(r"^\| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row) if span not in OF_OTHERS]


def is_said(symptom: str, texts: list[str]) -> bool:
    """Return whether a message has every piece of `symptom`: all between dots, numbers and capitals."""
    pieces = re.split(r"\.\.\.|\b[A-Z]{2,}\w*(?:\.yaml)?|\b\d+\b|\bN\b|\b(?:en|zh|wandb|nt|nan)\b", symptom)
    words = [piece.strip(" :,.").lower() for piece in pieces]
    return any(all(word in text for word in words if len(word) > 2) for text in texts)


def test_every_symptom_is_a_message():
    texts = messages()
    assert len(symptoms()) > 30
    assert [symptom for symptom in symptoms() if not is_said(symptom, texts)] == []


def test_another_is_not():
    assert not is_said("the disk is tired", messages())
