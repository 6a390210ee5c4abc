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
