"""The page that asks which picture is better, in a real browser: by keys, by touch, on a phone and on a laptop."""

import time
from dataclasses import replace

import pytest

import browser
from mlcm_rl.data.prompts import Prompt

pytestmark = browser.MARKS

HOSTILE = "<img src=x onerror=\"document.title='run'\"></script>{{ 7 * 7 }} & a cat"
SHOWN = "return [...document.querySelectorAll('.picture img')].map(image => new URL(image.src).pathname)"
ENTER, BACKSPACE, TAB, SPACE = "\ue007", "\ue003", "\ue004", " "


@pytest.fixture(scope="module")
def driver():
    with browser.driver():
        yield


@pytest.fixture(params=browser.WINDOWS, ids=browser.window_name)
def window(request, driver, tmp_path, choices, served):
    choices.prompts = [replace(choices.prompts[0], prompt=HOSTILE), Prompt("红" * 150, "zh"), *choices.prompts[2:]]
    opened = browser.Browser(tmp_path / "user", *request.param)
    opened.open(served.address)
    until(opened, "Pair 1 of 6")
    yield opened
    opened.close()


def until(window, text: str) -> None:
    """Wait for `text` on the page."""
    for _ in range(200):
        if text in window.run("return document.body.innerText"):
            return
        time.sleep(0.05)
    pytest.fail(f"{text!r} is not in {window.run('return document.body.innerText')!r}")


def click(window, selector: str) -> None:
    window.run(f"document.querySelector({selector!r}).click()")


def test_keys_choose_take_back_and_finish(window, choices, served):
    assert window.run(SHOWN) == ["/pictures/0/left", "/pictures/0/right"]
    for number, key in enumerate("12", start=2):
        window.press(key)
        until(window, f"Pair {number} of 6")
    assert choices.judgements() == [choices.sample_at(0, "left"), choices.sample_at(1, "right")]
    assert window.run(SHOWN) == ["/pictures/2/left", "/pictures/2/right"]
    assert window.run("return [byId('prompt').innerText, byId('prompt').lang]") == ["红苹果", "zh"]
    window.press("0")
    until(window, "Pair 4 of 6")
    window.press("u")
    until(window, "Pair 3 of 6")
    window.press(BACKSPACE)
    until(window, "Pair 2 of 6")
    assert choices.judgements() == [choices.sample_at(0, "left")]
    for number in range(3, 7):
        window.press("1")
        until(window, f"Pair {number} of 6")
    window.press("0")
    until(window, "All 6 pairs are judged")
    assert "One was better in 5, neither in 1." in window.run("return document.body.innerText")
    assert not served.stopped.is_set()
    window.press(ENTER)
    until(window, "The table of 5 pairs is in")
    assert served.stopped.is_set()


def test_touch_and_focus_choose_too(window, choices):
    click(window, "[data-side=right]")
    until(window, "Pair 2 of 6")
    click(window, "#neither")
    until(window, "Pair 3 of 6")
    click(window, "#undo")
    until(window, "Pair 2 of 6")
    assert choices.judgements() == [choices.sample_at(0, "right")]
    for _ in range(5):
        window.press(TAB)
        if window.run("return document.activeElement.dataset.side") == "left":
            break
    assert window.run("return document.activeElement.getAttribute('aria-label')") == "Picture 1 is better"
    assert window.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    window.press(SPACE)
    until(window, "Pair 3 of 6")
    assert choices.judgements()[1] == choices.sample_at(1, "left")


def test_a_prompt_is_text_and_nothing_comes_from_elsewhere(window, served):
    assert window.run("return byId('prompt').innerText") == HOSTILE
    assert window.run("return document.title") == "Which picture is better?"
    names = window.run("return performance.getEntriesByType('resource').map(one => one.name)")
    assert names
    assert all(name.startswith((served.address, "data:")) for name in names)


def test_it_fits_the_window_stands_out_and_follows_the_colour_scheme(window, choices):
    for prompt in (HOSTILE, choices.prompts[1].prompt):
        until(window, prompt)
        assert window.run("return document.documentElement.scrollWidth") <= window.width
        assert window.run("return document.documentElement.scrollHeight <= innerHeight")
        sides = window.run("return [...document.images].map(image => image.getBoundingClientRect().width)")
        assert min(sides) > 200
        assert browser.faint_text(window) == []
        background = window.screenshot().getpixel((2, 2))
        assert (max(background) < 60) if window.dark else (min(background) > 200)
        window.press("1")


def test_another_window_that_was_faster_is_followed(window, choices):
    choices.choose(0, "left")
    choices.choose(1, "left")
    window.press("2")  # of the first pair, which is judged by now
    until(window, "Pair 3 of 6")
    assert choices.judgements() == [choices.sample_at(0, "left"), choices.sample_at(1, "left")]


def test_trouble_is_told_and_survived(window, choices):
    gone = choices.picture(3, "left")  # two further than what is fetched ahead
    saved = gone.read_bytes()
    gone.unlink()
    for number in (2, 3):
        window.press("1")
        until(window, f"Pair {number} of 6")
    window.press("1")
    until(window, "The pictures of pair 4 cannot be shown")
    gone.write_bytes(saved)
    window.press("1")
    until(window, "Pair 4 of 6")
    assert window.run("return byId('trouble').hidden")
    window.run("fetch = () => Promise.reject(new TypeError())")
    window.press("1")
    until(window, "the command has ended")
    assert len(choices.judgements()) == 3
