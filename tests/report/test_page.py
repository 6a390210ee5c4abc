"""report.html: well formed, self-contained, accessible, and holding what it promises."""

import re
from html.parser import HTMLParser

import pytest

from evaluation_case import PROMPTS
from mlcm_rl.report import assembly, page
from mlcm_rl.report.figures import number
from mlcm_rl.report.types import Row

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Every element with its attributes and the text below it; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


@pytest.fixture(scope="module")
def text(finished):
    return (finished / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


@pytest.fixture(scope="module")
def record(finished):
    return assembly.read(finished / "report.json")


def test_prompts_of_both_languages_are_text_of_the_page(parsed):
    marked = {(element["text"], element["lang"]) for element in parsed.all("span") if "lang" in element}
    assert marked == set(PROMPTS)


def test_nothing_is_loaded_from_outside(parsed, text):
    for element in parsed.elements:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            assert element.get(name, "#").startswith(("#", "data:image/")), element
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert not parsed.all("script")
    (policy,) = [element["content"] for element in parsed.all("meta") if "http-equiv" in element]
    assert policy.startswith("default-src 'none'")


def test_pictures_and_plots_have_words_and_tables_have_headers(parsed):
    images = parsed.all("img")
    # Per prompt: student and teacher at 1, 2, 4 evaluations, and the reference.
    assert len(images) == len(PROMPTS) * 7
    assert all(re.fullmatch(r"(student|teacher) at \d+ (evaluations|guided steps)", image["alt"]) for image in images)
    plots = [element for element in parsed.all("svg") if "aria-hidden" not in element]
    assert len(plots) == 4 + 2  # distance, KID, R@5, colourfulness; two phases
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all("scope" in element for element in parsed.all("th"))
    assert (parsed.all("html")[0]["lang"], len(parsed.all("h1"))) == ("en", 1)


def test_ids_are_unique_so_that_plots_do_not_share_clips(parsed):
    ids = [element["id"] for element in parsed.elements if "id" in element]
    assert len(ids) == len(set(ids))


def test_the_table_holds_every_row_and_number(parsed, record):
    cells = [element["text"] for element in parsed.all("td")]
    for row in record.rows:
        assert number(row.metrics["distance"]) in cells
    assert sum(element.get("class") == "default" for element in parsed.all("tr")) == 6  # 3 steps of 2 students


def test_plots_take_the_pages_colours(text):
    assert "currentColor" in text
    assert page.plots.INK not in text
    words = re.findall(r"<text [^>]*>", text)
    assert words
    assert all("fill: currentColor" in word for word in words)  # none left black, unseen on a dark page


def test_east_asian_text_takes_fonts_of_its_language_before_latin_ones(text):
    rules = dict(re.findall(r"^(\S+) \{ font-family: ([^;]+);", text, flags=re.MULTILINE))
    ends = {":lang(zh)": "SC", ":lang(zh-Hant)": "TC", ":lang(ja)": "JP", ":lang(ko)": "KR"}
    assert set(rules) == {"body", *ends}
    for rule, end in ends.items():
        names = rules[rule].replace('"', "").split(", ")
        assert f"Noto Sans CJK {end}" in names
        assert names[-2:] == ["system-ui", "sans-serif"]
        assert not {"Segoe UI", "Roboto", "Noto Sans"} & set(names)
    assert "Noto Sans CJK SC" in rules["body"]  # of what states no language: the names of rewards


def test_every_caption_states_its_language(parsed, record):
    captions = [(one["lang"], one["text"]) for one in parsed.all("span") if "lang" in one]
    assert set(captions) == {(prompt.language, prompt.prompt) for prompt in record.prompts if prompt.shown}


def test_the_page_can_be_made_again_from_the_record(finished, record, text):
    assert page.render(record, finished) == text


def test_large_pictures_become_thumbnails(tmp_path):
    from PIL import Image

    path = page.picture_path(tmp_path, "row", 7)
    path.parent.mkdir(parents=True)
    Image.effect_noise((600, 600), 80).convert("RGB").save(path)
    uri = page.picture(tmp_path, Row.model_construct(id="row", metrics={}), 7).uri
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < path.stat().st_size / 5
    assert page.picture(tmp_path, None, 7) is None
