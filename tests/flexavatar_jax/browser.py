"""Headless Chromium with software WebGL, driven by Playwright: what tests of pages share."""

import base64
import contextlib
import io
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader"),
    *("--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--no-first-run"),
)
PATIENCE = 120_000
"""Milliseconds: WebGL by software on a busy machine."""


@contextlib.contextmanager
def chromium() -> Iterator:
    """A browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium to open the page with: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def open_page(browser, address: str, ready: str, width: int = 640, height: int = 420):
    """A new tab at `address` once `ready` is there; its errors and requests gather on it."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    page.troubles, page.requests = [], []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.troubles.append(m.text))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(address)
    page.wait_for_selector(ready)
    return page


def wait_until(page, condition: str) -> None:
    """Waits until a JavaScript condition holds.

    Playwright's own waiting evaluates strings in the page, which our pages' policy forbids.
    """
    until = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < until, f"never came: {condition}"
        page.wait_for_timeout(50)


def decode_picture(url: str) -> np.ndarray:
    """[H, W, 3] RGB in [0, 1] of a data: address."""
    return decode_png(base64.b64decode(url.partition(",")[2]))


def decode_png(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / 255
