"""Every picture of docs/gallery.md, from synthetic cells and the embedded models.

python examples/make_gallery.py docs/gallery

The report is photographed where playwright and a chromium are installed, and left as it is elsewhere. The loss curves
are of two short trainings made on the spot (minutes on two CPU cores).
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from diffdiscover3d.reporting.plots import save_dice_bars

SCAN = "synthetic-regular-test-000"
SCORES = Path(__file__).parent.parent / "benchmarks" / "results" / "evaluate-synthetic-regular.json"
WIDTH, BYTES = 900, 150_000  # the most that a picture may have


def main() -> None:
    """Make all pictures in a temporary folder, then put them small into the one asked for."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run("diffdiscover3d.cli", "synthesize", "-n", "4", "-o", work / "scans")
        scan = work / "scans" / f"{SCAN}.nii.gz"
        run("diffdiscover3d.cli", "segment", scan, "--level", "all", "--preview", "--report", "-o", work / "parts")
        shrink(work / "parts" / f"{SCAN}_dseg.png", target / "levels.png")
        if photograph(work / "parts" / f"{SCAN}_report.html", work / "report.png"):
            shrink(work / "report.png", target / "report.png")
        run("diffdiscover3d.cli", "features", scan, "--preview", "-o", work / "features")
        shrink(work / "features" / f"{SCAN}_features.png", target / "features.png")
        save_dice_bars(work / "dice.png", json.loads(SCORES.read_text(encoding="utf-8"))["rows"])
        shrink(work / "dice.png", target / "dice.png")
        train(work)
        shrink(work / "diffusion" / "losses.png", target / "losses-diffusion.png")
        shrink(work / "discovery" / "losses.png", target / "losses-discovery.png")


def train(work: Path) -> None:
    """Both trainings for as long as their curves need to show something."""
    shared = ["--preset", "small", "--dataset", work / "scans", "--log-every", "2", "--preview-every", "0"]
    diffusion = ["--sample-size", "24", "--max-steps", "40", "--batch-size", "1", "--mixed-precision", "no"]
    run("diffdiscover3d.train", "diffusion", *shared, *diffusion, "--output-dir", work / "diffusion")
    discovery = ["--teacher", "synthetic-regular", "--volume-size", "32", "--max-steps", "40"]
    run("diffdiscover3d.train", "discovery", *shared, *discovery, "--output-dir", work / "discovery")


def photograph(page: Path, picture: Path) -> bool:
    """A screenshot of a report; false where there is no browser."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no playwright or no chromium: the picture of the report stays as it is", file=sys.stderr)
        return False
    software = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=software)
        shown = browser.new_page(viewport={"width": 1200, "height": 800})
        shown.goto(page.resolve().as_uri())
        shown.wait_for_selector("body[data-ready]", timeout=120_000)
        shown.wait_for_timeout(1_000)  # a frame drawn in software
        shown.screenshot(path=picture, timeout=120_000)
        browser.close()
    return True


def shrink(source: Path, target: Path) -> None:
    """A PNG of 128 colours, made smaller until it has at most `WIDTH` pixels across and `BYTES` bytes."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    width = min(WIDTH, picture.width)
    while True:
        size = (width, round(picture.height * width / picture.width))
        picture.resize(size, Image.Resampling.LANCZOS).quantize(128).save(target, optimize=True)
        if target.stat().st_size <= BYTES:
            return
        width = int(0.85 * width)


def run(module: str, *arguments) -> None:
    """A command, as a user would run it."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
