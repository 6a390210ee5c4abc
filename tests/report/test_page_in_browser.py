"""The report's page in a real browser, on a phone and on a laptop, light and dark."""

import pytest

import browser

pytestmark = browser.MARKS


@pytest.fixture(scope="module")
def driver():
    with browser.driver():
        yield


@pytest.fixture(params=browser.WINDOWS, ids=browser.window_name)
def window(request, driver, tmp_path, tuned):
    opened = browser.Browser(tmp_path / "user", *request.param)
    opened.open((tuned / "report.html").as_uri())
    yield opened
    opened.close()


def test_the_page_fits_the_window_shows_its_pictures_and_follows_the_colour_scheme(window):
    assert window.run("return document.documentElement.scrollWidth") <= window.width
    shown = window.run("return [...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert shown
    assert all(shown)
    plots = window.run(
        "return [...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)"
    )
    assert plots
    assert all(height > 100 for height in plots)
    assert (
        window.run(
            "return performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:')).length"
        )
        == 0
    )
    picture = window.screenshot()
    background = picture.getpixel((2, picture.height // 2))
    assert (max(background) < 60) if window.dark else (min(background) > 200)
    assert len(picture.resize((200, 200)).getcolors(40000)) > 50


def test_text_stands_out_from_what_is_behind_it(window):
    assert browser.faint_text(window) == []


WIDTHS = """
const width = (language, text) => {
  const one = document.body.appendChild(document.createElement("span"));
  one.lang = language; one.textContent = text; one.style.font = "400 100px/1 inherit"; one.style.fontSize = "100px";
  one.style.whiteSpace = "nowrap";
  const {width} = one.getBoundingClientRect();
  one.remove();
  return Math.round(width);
};
return [["zh", "熊猫"], ["zh", "“猫”"], ["ja", "「猫」"], ["en", "“”"], ["zh", "。"]].map(one => width(...one));
"""
LINES = """
const box = document.body.appendChild(document.createElement("p"));
box.lang = "zh"; box.style.fontSize = "20px"; box.style.width = "100px"; box.textContent = "一二三四五。六七八九“十”";
const range = document.createRange(), lines = new Map();
[...box.textContent].forEach((character, i) => {
  range.setStart(box.firstChild, i); range.setEnd(box.firstChild, i + 1);
  const top = Math.round(range.getBoundingClientRect().top);
  lines.set(top, (lines.get(top) || "") + character);
});
box.remove();
return [...lines.values()];
"""


@pytest.mark.skipif(not browser.has_font("zh"), reason="no font for Chinese is installed")
def test_chinese_is_as_wide_as_its_characters_and_no_line_begins_with_a_full_stop(window):
    panda, quoted, japanese, latin, stop = window.run(WIDTHS)
    assert (panda, quoted, japanese, stop) == (200, 300, 300, 100)  # the quotation marks of a Chinese font
    assert latin < 120
    lines = window.run(LINES)
    assert "".join(lines) == "一二三四五。六七八九“十”"
    assert not [line for line in lines if line[0] in "。”" or line[-1] == "“"]
