"""The gallery in a real browser, from a file: by keys, by touch, filtered and ordered, with a thousand pictures."""

import time

import pytest

import browser
import planted_evaluations
from mlcm_rl.report import assembly, gallery
from planted_evaluations import HOSTILE

pytestmark = browser.MARKS

LEFT, UP, RIGHT, DOWN, ENTER, ESCAPE = "\ue012", "\ue013", "\ue014", "\ue015", "\ue007", "\ue00c"
PROMPTS = [(HOSTILE, "en"), ("红苹果" * 60, "zh"), ("a cat", "en"), ("熊猫", "zh")]
SCORES = {"student": [0.1, 0.9, 0.5, 0.2], "tuned": [0.2, 0.1, 0.5, 0.8]}
FOCUS = "return [Number(document.activeElement.dataset.prompt), Number(document.activeElement.dataset.column)]"
ORDER = "return [...document.querySelectorAll('.prompt')].map(one => Number(one.dataset.prompt))"
LARGE = "return [byId('large').open, byId('large-prompt').textContent, byId('large-column').textContent]"


def page(folder, prompts=PROMPTS, scores=SCORES, **settings):
    """Write a gallery of an evaluation that kept the pictures of all prompts; return its address."""
    stage = planted_evaluations.write(folder / "stage", scores, prompts=prompts, keeps=True, **settings)
    found = gallery.gather([gallery.Evaluation("run", stage, assembly.read(stage / "report.json"))])
    gallery.write_page(found, "run", folder / "gallery.html")
    return (folder / "gallery.html").as_uri()


@pytest.fixture(scope="module")
def driver():
    with browser.driver():
        yield


@pytest.fixture(params=browser.WINDOWS, ids=browser.window_name)
def window(request, driver, tmp_path):
    opened = browser.Browser(tmp_path / "user", *request.param)
    opened.open(page(tmp_path))
    until(opened, "return document.querySelectorAll('.cell').length > 0")
    yield opened
    opened.close()


def until(window, script):
    """Wait until `script` returns true."""
    for _ in range(200):
        if window.run(script):
            return
        time.sleep(0.05)
    pytest.fail(f"never true: {script}")


def change(window, control, value):
    window.run(f"byId('{control}').value = {value!r}; byId('{control}').dispatchEvent(new Event('change'))")


def test_keys_move_between_pictures_enlarge_them_and_come_back(window):
    window.press("1")
    assert window.run(FOCUS) == [0, 0]
    for key, place in ((RIGHT, [0, 1]), (DOWN, [1, 1]), (LEFT, [1, 0]), (LEFT, [1, 0]), (UP, [0, 0]), ("3", [0, 2])):
        window.press(key)
        assert window.run(FOCUS) == place
    window.press(ENTER)
    assert window.run(LARGE) == [True, HOSTILE, "3. run: tuned, 2 steps, gamma 0"]
    assert window.run("return byId('large-scores').innerText.replace(/\\s+/g, ' ')") == "Distance 0 brightness 0.2"
    window.press("1")
    assert window.run(LARGE)[2] == "1. run: student, 2 steps, gamma 0"
    window.press(DOWN)
    assert window.run("return byId('large-prompt').lang") == "zh"
    window.press(ESCAPE)
    assert window.run(LARGE)[0] is False
    assert window.run(FOCUS) == [1, 0]


def test_a_tap_enlarges_and_buttons_lead_on(window):
    window.run("document.querySelector('.cell').click()")
    window.run("document.querySelector('[data-move=right]').click()")
    assert window.run(LARGE) == [True, HOSTILE, "2. run: student, 4 steps, gamma 0"]
    window.run("byId('close').click()")
    assert window.run(LARGE)[0] is False


def test_prompts_are_filtered_and_ordered_over_the_columns_that_are_shown(window):
    change(window, "language", "zh")
    assert window.run(ORDER) == [1, 3]
    change(window, "language", "")
    change(window, "order", "range:1")  # brightness: 0.2, 0.9, 0.5, 0.8 apart, the teacher's being 0
    assert window.run(ORDER) == [1, 3, 2, 0]
    window.run("document.querySelectorAll('#columns input')[5].click()")  # without the teacher: 0.1, 0.8, 0, 0.6
    assert window.run(ORDER) == [1, 3, 0, 2]
    until(window, "return document.querySelectorAll('.good').length > 0")
    marked = "return ['good', 'bad'].map(name => Number(document.querySelector(`.${name}`).dataset.column))"
    good, bad = window.run(marked)
    assert good in (0, 1)  # the student's, by brightness 0.9
    assert bad in (2, 3)
    change(window, "order", "worst:1")  # the least of both students
    assert window.run(ORDER) == [0, 1, 3, 2]
    change(window, "order", "worst:0")  # the largest distance
    assert window.run(ORDER) == [3, 2, 1, 0]
    for column in (0, 1):
        window.run(f"document.querySelectorAll('#columns input')[{column}].click()")
    change(window, "order", "worst:1")  # of the tuned student alone: 0.2, 0.1, 0.5, 0.8
    assert window.run(ORDER) == [1, 0, 2, 3]
    window.run("byId('find').value = 'A CAT'; byId('find').dispatchEvent(new Event('input'))")
    assert window.run(ORDER) == [2]
    assert window.run("return byId('count').textContent") == "1 of 4 rows, 2 of 6 columns"


def test_two_columns_are_named_for_a_blind_comparison(window):
    change(window, "first", "1")
    change(window, "second", "3")
    assert window.run("return byId('command').textContent") == (
        "mlcm gallery RUN... --blind 'run:student@4' 'run:tuned@4' --out FOLDER"
    )


def test_prompts_are_text_and_nothing_comes_from_elsewhere(window):
    assert window.run("return document.querySelector('.prompt h2 span').textContent") == HOSTILE
    assert window.run("return document.title") == "run"
    assert window.run("return document.querySelectorAll('script').length") == 2
    assert window.run("return performance.getEntriesByType('resource').every(one => one.name.startsWith('data:'))")


@pytest.mark.parametrize("is_open", [False, True])
def test_it_fits_the_window_stands_out_and_follows_the_colour_scheme(window, is_open):
    window.run(f"byId('controls').open = {str(is_open).lower()}")
    assert window.run("return document.documentElement.scrollWidth") <= window.width
    assert window.run("return document.documentElement.scrollHeight <= innerHeight")
    assert window.run("return byId('table').clientHeight") > 150
    widths = "return [...document.querySelectorAll('.prompt h2')].map(one => one.getBoundingClientRect().width)"
    assert max(window.run(widths)) <= window.width
    until(window, "return [...document.images].filter(one => one.src).every(one => one.complete && one.naturalWidth)")
    assert browser.faint_text(window) == []
    background = window.screenshot().getpixel((2, 2))
    assert (max(background) < 60) if window.dark else (min(background) > 200)


def test_of_a_thousand_pictures_those_near_the_window_are_shown(driver, tmp_path):
    prompts = [(f"number {i}", "en") for i in range(250)]
    address = page(tmp_path, prompts, {"student": [0.0] * 250}, size=64)
    opened = browser.Browser(tmp_path / "user", "laptop", False)
    opened.open(address)
    until(opened, "return document.querySelectorAll('.cell').length > 0")
    assert opened.run("return prompts.length * columns.length") == 1000
    assert opened.run("return document.images.length") < 100
    opened.run("byId('table').scrollTop = byId('table').scrollHeight")
    until(opened, "return document.querySelector('.cell[data-prompt=\"249\"]') !== null")
    until(opened, "return document.querySelector('.cell[data-prompt=\"1\"]') === null")
    assert opened.run("return document.images.length") < 100
    opened.close()
