"""Every relative link of every page leads to a file that is there, and to a heading that it has; without the site."""

import pages
import pytest


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_no_link_is_dead(page):
    assert pages.dead_links(page, pages.text_of(page)) == []


def test_a_dead_link_is_named():
    page = pages.ROOT / "docs" / "first_run.md"
    good = "[a](recipe.md) [b](#the-words) [c](../README.md) [d](results.md#the-demo)\n\n## The words\n\n`[e](no.md)`\n"
    assert pages.dead_links(page, good) == []
    for target, fault in (("no.md", "file"), ("#no", "heading"), ("results.md#no", "heading"), ("../no/", "file")):
        assert pages.dead_links(page, f"[a]({target})\n") == [f"first_run.md: {target}: no such {fault}"]


def test_a_link_in_a_generated_part_is_looked_at():
    assert len(pages.links(pages.text_of(pages.ROOT / "docs" / "rewards.md"))) > 20


def test_every_page_of_the_docs_is_in_the_navigation():
    text = pages.text_of(pages.ROOT / "docs" / "navigation.md")
    names = {f"docs/{page.stem}" for page in (pages.ROOT / "docs").glob("*.md")} - {"docs/navigation"}
    assert names <= set(text.split())


@pytest.mark.parametrize("name", ["recipe", "command_reference", "families", "rewards", "recipes"])
def test_what_a_page_has_of_the_code_is_current(name):
    """After a change of the code, `python docs/generated.py` writes it."""
    page = pages.ROOT / "docs" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == pages.generated.without_contents(pages.text_of(page))
