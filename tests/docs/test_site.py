"""The site builds without a warning, as `make docs` builds it, and its pages load nothing from elsewhere."""

import re
import subprocess
import sys

import pages
import pytest

pytestmark = pytest.mark.slow
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//|<link[^>]*\srel=["']stylesheet["'][^>]*(?:https?:)?//"""
    r"""|@import\s+["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


def build(out, *options):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", *options, ".", str(out)]
    return subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, encoding="utf-8")


def test_it_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    built = [file for file in tmp_path.rglob("*") if file.suffix in (".html", ".css")]
    names = {str(file.relative_to(tmp_path).with_suffix("")) for file in built}
    assert {"index", *(str(page.relative_to(pages.ROOT).with_suffix("")) for page in pages.pages())} - names == {
        "docs/navigation"
    }
    assert [file.name for file in built if ELSEWHERE.search(file.read_text(encoding="utf-8"))] == []
    assert "kind: distill" in (tmp_path / "docs" / "recipe.html").read_text(encoding="utf-8")


def test_a_dead_link_fails_it(tmp_path):
    done = build(tmp_path, "-D", "include_patterns=README.md")
    assert done.returncode != 0
    assert "myst.xref_missing" in done.stderr


@pytest.mark.parametrize("text", ['<script src="https://a/b.js">', "<img alt='' src='//a/b'>", "@import '//a/b';"])
def test_what_is_elsewhere_is_seen(text):
    assert ELSEWHERE.search(text)
    assert not ELSEWHERE.search(text.replace("https:", "").replace("//", ""))
