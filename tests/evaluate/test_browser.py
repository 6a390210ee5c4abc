"""The page in a real browser, on a phone and on a laptop, light and dark, through the WebDriver protocol."""

import base64
import json
import shutil
import subprocess
import time
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PORT = 9533
DIRECT = build_opener(ProxyHandler({})).open  # past any proxy: the driver is on this machine
SIZES = {"phone": (390, 844, 3.0), "laptop": (1280, 800, 1.0)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]


class Browser:
    """One chromium window, spoken to over its driver."""

    def __init__(self, user_data: Path, size: str, dark: bool):
        width, height, ratio = SIZES[size]
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={user_data}", f"--blink-settings=preferredColorScheme={int(not dark)}"],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": ratio}},
        }
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self.session = ""
        self.session = "/" + self.ask("POST", "/session", wanted)["sessionId"]

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        address = f"http://127.0.0.1:{PORT}{'/session' if self.session else ''}{self.session}{path}"
        request = Request(address, data, {"Content-Type": "application/json"}, method=method)
        with DIRECT(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def screenshot(self):
        return Image.open(BytesIO(base64.b64decode(self.ask("GET", "/screenshot")))).convert("RGB")


@pytest.fixture(scope="module")
def driver():
    with subprocess.Popen([DRIVER, f"--port={PORT}"], stdout=subprocess.DEVNULL) as process:
        for _ in range(100):
            try:
                DIRECT(f"http://127.0.0.1:{PORT}/status", timeout=5).close()
                break
            except URLError:
                time.sleep(0.1)
        yield process
        process.terminate()


@pytest.fixture(
    params=[(size, dark) for size in SIZES for dark in (False, True)], ids=lambda one: f"{one[0]}-dark{one[1]}"
)
def browser(request, driver, tmp_path, tuned):
    size, dark = request.param
    window = Browser(tmp_path / "user", size, dark)
    window.dark, window.width = dark, SIZES[size][0]
    window.ask("POST", "/url", {"url": (tuned / "report.html").as_uri()})
    yield window
    window.ask("DELETE", "")


def test_the_page_fits_the_window_shows_its_pictures_and_follows_the_colour_scheme(browser):
    assert browser.run("return document.documentElement.scrollWidth") <= browser.width
    shown = browser.run("return [...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert shown
    assert all(shown)
    plots = browser.run(
        "return [...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)"
    )
    assert plots
    assert all(height > 100 for height in plots)
    assert (
        browser.run(
            "return performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:')).length"
        )
        == 0
    )
    picture = browser.screenshot()
    background = picture.getpixel((2, picture.height // 2))
    assert (max(background) < 60) if browser.dark else (min(background) > 200)
    assert len(picture.resize((200, 200)).getcolors(40000)) > 50


def test_text_stands_out_from_what_is_behind_it(browser):
    """WCAG's contrast ratio of 4.5 for every colour of text on the page's own backgrounds."""
    pairs = browser.run(
        """
        const behind = element => {
          for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
          }
        };
        return [...document.querySelectorAll('p, h1, h2, small, dt, dd, th, td, li, span, figure')]
          .map(element => [getComputedStyle(element).color, behind(element), element.className || element.tagName]);
        """
    )
    assert pairs
    for colour, background, name in {tuple(pair) for pair in pairs}:
        light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name}: {colour} on {background}"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    channels = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
