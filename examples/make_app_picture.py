"""Make the picture of the app in the docs: python examples/make_app_picture.py docs/how-to/app.png

Needs the extras `app` and `test`, and a Chromium.
"""

import io
import sys
from pathlib import Path

from PIL import Image

from diffdiscover3d.app import running_app
from tests.helpers.browser import recorded_page, started_browser

with running_app(device="cpu") as url, started_browser() as browser:
    page = recorded_page(browser, (1200, 940))
    page.goto(url)
    page.get_by_role("button", name="Demo: cells").click()
    page.locator(".file-preview").get_by_text("synthetic").first.wait_for()
    page.get_by_role("button", name="Find the parts").click()
    report = page.frame_locator("iframe.report-frame")
    report.locator("body[data-ready]").wait_for(timeout=120_000)
    page.mouse.move(1, 1)
    page.wait_for_timeout(1500)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
# 64 colours keep the file small
shot.quantize(64, dither=Image.Dither.NONE).save(Path(sys.argv[1]), optimize=True)
