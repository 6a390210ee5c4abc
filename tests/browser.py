"""Chromium for tests of pages, on a phone or on a laptop, light or dark, through the WebDriver protocol."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
WINDOWS = [(size, dark) for size in SIZES for dark in (False, True)]

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]


def has_font(language: str) -> bool:
    """Return whether a font for a language is installed, where fontconfig can say so."""
    listing = shutil.which("fc-list")
    return listing is not None and bool(subprocess.run([listing, f":lang={language}"], capture_output=True).stdout)


def window_name(window: tuple[str, bool]) -> str:
    """What a test calls one of WINDOWS."""
    size, dark = window
    return f"{size}-dark{dark}"


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
        self.dark, self.width = dark, width
        self.session = ""
        self.session = "/" + self.ask("POST", "/session", wanted)["sessionId"]

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        address = f"http://127.0.0.1:{PORT}{'/session' if self.session else ''}{self.session}{path}"
        request = Request(address, data, {"Content-Type": "application/json"}, method=method)
        with DIRECT(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self.ask("POST", "/url", {"url": address})

    def run(self, script):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, key):
        strokes = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def screenshot(self):
        return Image.open(BytesIO(base64.b64decode(self.ask("GET", "/screenshot")))).convert("RGB")

    def close(self):
        self.ask("DELETE", "")


@contextmanager
def driver() -> Iterator[None]:
    """The driver, running; windows are opened while it does."""
    with subprocess.Popen([DRIVER, f"--port={PORT}"], stdout=subprocess.DEVNULL) as process:
        for _ in range(100):
            try:
                DIRECT(f"http://127.0.0.1:{PORT}/status", timeout=5).close()
                break
            except URLError:
                time.sleep(0.1)
        yield
        process.terminate()


TEXT = "p, h1, h2, small, dt, dd, th, td, li, span, figure, button, kbd"


def faint_text(window: Browser) -> list[str]:
    """Text below WCAG's contrast ratio of 4.5 on the page's own backgrounds, each with its colours."""
    pairs = window.run(
        """
        const behind = element => {
          for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
          }
        };
        return [...document.querySelectorAll('TEXT')].filter(element => !element.disabled)
          .map(element => [getComputedStyle(element).color, behind(element), element.className || element.tagName]);
        """.replace("TEXT", TEXT)
    )
    assert pairs
    faint = []
    for colour, background, name in sorted({tuple(pair) for pair in pairs}):
        light, dark = sorted((_luminance(colour), _luminance(background)), reverse=True)
        if (light + 0.05) / (dark + 0.05) < 4.5:
            faint.append(f"{name}: {colour} on {background}")
    return faint


def _luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    channels = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
