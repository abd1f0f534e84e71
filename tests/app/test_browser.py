"""The app in a headless browser: upload, run, view, download; its requests and its messages."""

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffdiscover3d.app import jobs, server
from diffdiscover3d.cli.app import app
from tests.helpers.browser import changed, pixels, recorded_page, started_browser

pytestmark = pytest.mark.slow

BOXES = np.random.default_rng(2).normal(0, 0.05, (30, 24, 20)).astype(np.float32)
BOXES[4:24, 5:20, 4:15] += 1
BOXES[10:18, 8:14, 6:12] += 1
# the canvas of the viewer has no reading back of pixels, which its library tries once
HARMLESS = ("Method not implemented",)


@pytest.fixture(scope="module")
def browser():
    with started_browser() as browser:
        yield browser


@pytest.fixture
def running(tmp_path, monkeypatch):
    """Address and folder of a running app that takes 2 MB."""
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "diffdiscover3d[app]"')
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with server.running_app(max_size_mb=2, device="cpu") as url:
        (root,) = Path(tempfile.tempdir).glob("diffdiscover3d-app-*")
        yield url, root


def upload(page, url: str, *paths: Path) -> None:
    page.goto(url)
    page.locator("input[type=file]").first.set_input_files([str(p) for p in paths])


def find_parts(page, name: str) -> None:
    """Run the job once the upload is listed; its name is shown in two pieces, the first one shortened."""
    page.locator(".file-preview").get_by_text(Path(name).stem[:5]).first.wait_for(timeout=30_000)
    page.get_by_role("button", name="Find the parts").click()


def message(page) -> str:
    toast = page.locator(".toast-body").first
    toast.wait_for(timeout=60_000)
    return toast.inner_text()


def report_in(page):
    report = page.frame_locator("iframe.report-frame")
    report.locator("body[data-ready]").wait_for(timeout=120_000)
    return report


def test_upload_view_toggle_and_download(running, browser, make_nifti, tmp_path):
    url, root = running
    path = make_nifti(tmp_path / "scan.nii.gz", BOXES)
    page = recorded_page(browser, (1300, 1000))
    upload(page, url, path)
    find_parts(page, path.name)
    report = report_in(page)
    view = report.locator("#view")
    first = pixels(view)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 100  # not blank
    part = report.locator('[data-table]:not([hidden]) input[data-part="1"]')
    part.uncheck()
    assert changed(first, pixels(view)) > 0.002
    part.check()
    assert changed(first, pixels(view)) == 0
    report.locator('input[name="level"]').first.check()
    assert changed(first, pixels(view)) > 0.002
    # the page around the report is out of its reach
    assert page.locator("iframe.report-frame").get_attribute("sandbox") == "allow-scripts"
    frame = next(f for f in page.frames if f.parent_frame is not None)
    assert frame.evaluate("() => { try { return parent.document.title } catch (error) { return error.name } }") == (
        "SecurityError"
    )

    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)  # clicks that meet a page which still scrolls go to the frame
    page.get_by_role("tab", name="Parts").click()
    page.wait_for_function("document.querySelector('#parts')?.innerText.includes('mean_intensity')", timeout=30_000)
    page.get_by_role("tab", name="Files").click()
    with page.expect_download() as download:
        page.locator('a[download="scan_level-2_dseg.nii.gz"]').click()
    done = CliRunner().invoke(app, ["segment", str(path), "--level", "all", "-o", str(tmp_path / "parts")])
    assert done.exit_code == 0, done.output
    expected = (tmp_path / "parts" / "scan_level-2_dseg.nii.gz").read_bytes()
    assert Path(download.value.path()).read_bytes() == expected

    outside = [r for r in page.seen["requests"] if not r.startswith((url, "blob:", "data:"))]
    assert outside == [] and len(page.seen["requests"]) > 10
    assert [e for e in page.seen["errors"] if not any(h in e for h in HARMLESS)] == []
    assert list(root.rglob("scan.nii.gz")) and list(root.rglob("*_dseg.nii.gz"))
    page.close()
    wait_until(lambda: not list(root.rglob("*.nii.gz")) and not list(root.rglob("*_report.html")))


def test_a_tiff_and_what_cannot_be_used(running, browser, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    url, _ = running
    stack = np.round(100 * (BOXES.T - BOXES.min())).astype(np.uint16)
    tifffile.imwrite(tmp_path / "cells.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    page = recorded_page(browser, (1300, 1000))
    upload(page, url, tmp_path / "cells.tif")
    page.get_by_role("radio", name="1", exact=True).check()
    find_parts(page, "cells.tif")
    assert "cells.tif" in report_in(page).locator("h1").inner_text()
    page.get_by_text("no voxel size").first.wait_for()  # the note of the command
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.get_by_role("tab", name="Files").click()
    page.locator('a[download="cells_dseg.tif"]').wait_for()
    # the same page: a name that is no array; what is written there stays text
    page.get_by_text("Options for unusual files").click()
    page.get_by_label("Name of the array").fill("<i>x</i>")
    find_parts(page, "cells.tif")
    shown = message(page)
    assert "<i>x</i>" in shown and "\n\n\n" not in shown and page.locator(".toast-body i").count() == 0
    page.locator("iframe.report-frame").wait_for(state="detached")  # no results of the job before
    page.close()

    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"<html>Not found</html>")
    page = recorded_page(browser, (1300, 1000))
    upload(page, url, broken)
    find_parts(page, broken.name)
    shown = message(page)
    assert "broken.nii.gz: " in shown and "web page" in shown and "/" not in shown and "Traceback" not in shown
    page.close()

    (tmp_path / "large.nii").write_bytes(bytes(2**21 + 1))
    page = recorded_page(browser, (1300, 1000))
    upload(page, url, tmp_path / "large.nii")
    assert "exceed the maximum allowed size of 2.0 Mb" in message(page)
    page.close()


def test_the_demos_and_the_stop(running, browser, monkeypatch):
    url, root = running
    began, segment = threading.Event(), jobs.segment

    def slow(*arguments, **options):
        began.set()
        time.sleep(3)
        return segment(*arguments, **options)

    monkeypatch.setattr(jobs, "segment", slow)
    page = recorded_page(browser, (1300, 1000))
    page.goto(url)
    page.get_by_role("button", name="Demo: brain").click()
    find_parts(page, "brain-phantom-test-000.nii.gz")
    assert began.wait(60)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped.").wait_for(timeout=60_000)
    assert not list((root / "results").iterdir())
    page.get_by_role("button", name="Find the parts").click()
    report = report_in(page)
    assert "brain-phantom" in report.locator("h1").inner_text()
    assert report.locator('input[name="level"]').count() == 2  # the model was chosen with the demo
    page.close()


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
