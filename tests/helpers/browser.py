"""A headless Chromium for tests, and comparisons of what it draws."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@contextmanager
def started_browser() -> Iterator:
    """A browser of playwright; the test is skipped where there is none."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def recorded_page(browser, size: tuple[int, int]):
    """A new page that records its requests, warnings and errors in `page.seen`."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.seen = {"requests": [], "errors": []}
    page.on("request", lambda r: page.seen["requests"].append(r.url))
    page.on("console", lambda m: page.seen["errors"].append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.seen["errors"].append(str(e)))
    return page


def pixels(element) -> np.ndarray:
    """(h, w, 3) colours of an element after the time to render a frame in software."""
    element.page.wait_for_timeout(400)
    shot = element.screenshot(timeout=120_000)
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def changed(one: np.ndarray, two: np.ndarray) -> float:
    """Share of the pixels that differ visibly."""
    return float((np.abs(one - two).max(axis=-1) > 12).mean())
