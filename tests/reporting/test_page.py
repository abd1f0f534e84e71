"""The report: its text, and the page itself in a headless browser."""

import base64
import gzip
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import diffdiscover3d
from diffdiscover3d.data.formats.nifti.reading import read_nifti, write_like
from diffdiscover3d.errors import InputError
from diffdiscover3d.reporting import page as module
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.outputs import stem
from diffdiscover3d.workflows.reports import find_label_maps, make_reports, write_report
from tests.helpers.browser import changed, pixels, recorded_page, started_browser

OBLIQUE = np.array([[0, -1.9, 0.3, 30.0], [0, 0.4, 2.9, -12.0], [-1.5, 0, 0, 44.0], [0, 0, 0, 1]])
SCANS = os.environ.get("DIFFDISCOVER3D_TEST_SCANS")  # folder of real scans whose reports are opened as well
# before the page's own scripts: a list of what its Content-Security-Policy refuses
RECORD_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) =>
    window.violations.push(`${e.effectiveDirective} ${e.blockedURI}`));
"""


@pytest.fixture
def scan(tmp_path, make_nifti):
    """A scan of a box in a box, with label maps of two levels."""
    values = np.random.default_rng(0).normal(100, 10, (28, 36, 20))
    inner, outer = np.zeros(values.shape, np.uint8), np.zeros(values.shape, np.uint8)
    outer[5:23, 6:30, 4:16] = 1
    inner[:] = outer
    inner[10:18, 12:24, 7:13] = 2
    path = make_nifti(
        tmp_path / "a <b>&'c.nii.gz", (values + 200 * outer + 300 * (inner == 2)).astype(np.float32), OBLIQUE
    )
    source = read_nifti(path)
    for level, labels in ((1, outer), (2, inner)):
        canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, OBLIQUE))
        write_like(
            tmp_path / f"{stem(path)}_level-{level}_dseg.nii.gz", np.asarray(canonical.dataobj), source, labels=True
        )
    return path


def embedded(path: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S).group(1))


def image_of(item: dict) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(item["nifti"])))


def test_volumes_in_the_page_have_the_geometry_of_the_scan(scan):
    (page,) = make_reports(scan)
    data, source = embedded(page), nib.as_closest_canonical(nib.load(scan))
    shown = image_of(data["scan"])
    np.testing.assert_allclose(shown.affine, source.affine, atol=1e-4)
    step = (source.get_fdata().max() - source.get_fdata().min()) / 255
    np.testing.assert_allclose(shown.get_fdata(), source.get_fdata(), atol=step)
    maps = [nib.as_closest_canonical(nib.load(p)) for p in find_label_maps(scan)]
    for item, labels in zip(data["levels"], maps, strict=True):
        np.testing.assert_array_equal(np.asarray(image_of(item).dataobj), np.asarray(labels.dataobj))
        np.testing.assert_allclose(image_of(item).affine, labels.affine, atol=1e-4)


def test_text_of_the_page(scan):
    (page,) = make_reports(scan)
    text = page.read_text(encoding="utf-8")
    assert "<b>" not in text.split("<script")[0] and "a &lt;b&gt;&amp;" in text
    ml = 8 * 12 * 6 * abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    assert f"<td>{ml:,.2f}</td>" in text and "Copyright (c) 2021, Niivue" in text
    assert not re.search(r"@[A-Z]+@", text.split("<script")[0]) and "Which part lies in which" in text
    assert not re.search(r"(src|href)=.?https?:", text)
    assert page.stat().st_size < 1.5 * 2**20


def test_large_scans_are_shown_smaller_with_their_geometry(tmp_path, make_nifti, monkeypatch):
    monkeypatch.setattr(module, "MAX_VOXELS", 12**3)
    x, y, z = np.meshgrid(*(np.arange(n) for n in (48, 24, 36)), indexing="ij")
    path = make_nifti(tmp_path / "s.nii.gz", (x + 2 * y + 3 * z).astype(np.float32), OBLIQUE)
    make_nifti(tmp_path / "s_dseg.nii.gz", (x >= 24).astype(np.uint8), OBLIQUE)
    (page,) = make_reports(path)
    assert "to keep the page small" in page.read_text(encoding="utf-8")
    data = embedded(page)
    shown, labels = image_of(data["scan"]), image_of(data["levels"][0])
    assert np.prod(shown.shape) <= 12**3 and shown.shape == labels.shape
    # the scan is a ramp in world coordinates: shown values must be those of the ramp at the shown centres
    inverse = np.linalg.inv(OBLIQUE)
    inner = np.argwhere(np.ones(shown.shape))
    inner = inner[((inner > 2) & (inner < np.array(shown.shape) - 3)).all(axis=1)]
    places = nib.affines.apply_affine(inverse @ shown.affine, inner)
    np.testing.assert_allclose(shown.get_fdata()[tuple(inner.T)], places @ [1, 2, 3], atol=1.5)
    found, sure = np.asarray(labels.dataobj)[tuple(inner.T)], np.abs(places[:, 0] - 23.5) > 1.5
    np.testing.assert_array_equal(found[sure], (places[sure, 0] > 23.5))


def test_label_maps_of_another_scan_are_refused(scan, tmp_path, make_nifti):
    cut = make_nifti(tmp_path / "cut.nii.gz", np.zeros((28, 36, 19), np.uint8), OBLIQUE)
    moved = make_nifti(tmp_path / "moved.nii.gz", np.zeros((28, 36, 20), np.uint8), OBLIQUE + np.eye(4) * [1, 1, 1, 0])
    halves = make_nifti(tmp_path / "halves.nii.gz", np.full((28, 36, 20), 0.5, np.float32), OBLIQUE)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"<html>")
    for labels, word in ((cut, "shape"), (moved, "not aligned"), (halves, "integers"), (broken, "web page")):
        with pytest.raises(InputError, match=word):
            make_reports(scan, labels=[labels], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_scans_get_an_index(scan, tmp_path, make_nifti):
    other = make_nifti(tmp_path / "other.nii.gz", np.random.default_rng(1).normal(size=(9, 8, 7)).astype(np.float32))
    with pytest.raises(InputError, match=r"other_dseg\.nii\.gz in .*; run segment first"):
        make_reports([scan, other], output=tmp_path / "pages")
    make_nifti(tmp_path / "other_dseg.nii.gz", np.ones((9, 8, 7), np.uint8))
    *pages, index = make_reports([scan, other], output=tmp_path / "pages")
    text = index.read_text(encoding="utf-8")
    assert len(pages) == 2 and text.count("_report.html") == 2 and "a &lt;b&gt;" in text and "2 scans" in text


@pytest.fixture(scope="session")
def browser():
    with started_browser() as browser:
        yield browser


def open_page(browser, path: Path, size=(700, 620), ready="body[data-ready]"):
    """Open a report, record its requests and errors, and wait until it is drawn."""
    page = recorded_page(browser, size)
    page.add_init_script(RECORD_VIOLATIONS)
    page.goto(path.resolve().as_uri())
    page.wait_for_selector(ready, timeout=120_000)
    return page


def violations(page) -> list[str]:
    """What the page's Content-Security-Policy has refused."""
    return page.evaluate("window.violations")


def check_in_browser(page, path: Path) -> None:
    """Checks for every report of several levels."""
    view = page.locator("#view")
    first = pixels(view)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 100  # not blank
    assert changed(first, pixels(view)) == 0  # and stable, so that later changes are not flicker
    part = page.locator('[data-table]:not([hidden]) input[data-part="1"]')
    part.uncheck()
    without = pixels(view)
    assert changed(first, without) > 0.002
    part.check()
    assert changed(first, pixels(view)) == 0
    page.locator("#opacity").fill("0")
    bare = pixels(view)
    assert changed(first, bare) > 0.002
    colourful = np.ptp(bare, axis=-1) > 60
    assert colourful.mean() < 0.01 < (np.ptp(first, axis=-1) > 60).mean()  # only the grey scan remains
    page.locator("#opacity").fill("0.5")
    page.locator('input[name="level"]').first.check()
    assert changed(first, pixels(view)) > 0.002
    page.locator('input[name="view"][value="render"]').check()
    assert changed(first, pixels(view)) > 0.02
    local = [url for url in page.seen["requests"] if not url.startswith(("blob:", "data:"))]
    assert local == [path.resolve().as_uri()], "the page asked for something beyond itself"
    assert page.seen["errors"] == violations(page) == []


@pytest.mark.slow
def test_report_in_a_browser(scan, browser):
    (path,) = make_reports(scan)
    page = open_page(browser, path)
    check_in_browser(page, path)
    page.close()


@pytest.mark.slow
def test_background_and_sides_in_a_browser(tmp_path, make_nifti, browser):
    """Every part is drawn by default, one can be chosen as background, and left and right can be exchanged."""
    labels = np.zeros((28, 36, 20), np.uint8)
    labels[3:13, 6:30, 4:16], labels[15:19, 12:20, 6:14] = 1, 2  # the right half and the left half differ
    values = np.random.default_rng(0).normal(100, 10, labels.shape) + 100 * labels
    scan = make_nifti(tmp_path / "scan.nii.gz", values.astype(np.float32), np.diag([2.0, 2, 3, 1]))
    write_like(tmp_path / "scan_dseg.nii.gz", labels, read_nifti(scan), labels=True)
    (path,) = make_reports(scan)
    page = open_page(browser, path)
    view = page.locator("#view")
    boxes = page.locator("[data-table]:not([hidden]) input[data-part]")
    shown = lambda: [boxes.nth(i).is_checked() for i in range(boxes.count())]  # noqa: E731
    page.locator('input[name="view"][value="axial"]').check()
    page.locator("#opacity").fill("1")
    assert shown() == [True] * 3 and page.locator("#background").input_value() == ""
    everything = pixels(view)
    page.locator("#background").select_option("0")
    assert shown() == [False, True, True]
    inside = pixels(view)
    assert changed(everything, inside) > 0.05 and (np.ptp(inside, axis=-1) > 60).mean() > 0.01  # part 0 is grey
    page.locator("#background").select_option("2")
    assert shown() == [True, True, False]
    page.locator("#background").select_option("")
    assert shown() == [True] * 3 and changed(everything, pixels(view)) == 0
    boxes.nth(1).uncheck()  # by hand: not the background, though the list follows when the level changes
    assert changed(everything, pixels(view)) > 0.01
    boxes.nth(1).check()
    # radiological: the patient's right is on the left of the picture
    page.locator("#background").select_option("0")
    radiological, text = np.ptp(pixels(view), axis=-1) > 60, page.locator("#convention").text_content()
    assert page.locator("#radiological").is_checked() and "right is on the left" in text
    page.locator("#radiological").uncheck()
    neurological = np.ptp(pixels(view), axis=-1) > 60
    assert "right is on the right" in page.locator("#convention").text_content()
    middle = lambda mask: np.nonzero(mask)[1].mean() / mask.shape[1]  # noqa: E731
    # RAS+: larger indices are further to the right, and the larger part has the smaller ones, so it is on the left side
    assert middle(neurological) < 0.5 < middle(radiological)
    both = (neurological & radiological[:, ::-1]).sum() / neurological.sum()
    assert both > 0.9 > (neurological & radiological).sum() / neurological.sum()
    assert page.seen["errors"] == []
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(not SCANS, reason="DIFFDISCOVER3D_TEST_SCANS names no folder of real scans")
def test_reports_of_real_scans_in_a_browser(tmp_path, browser):
    results = segment(SCANS, tmp_path, level="all", report=True, fast=True)
    assert results
    for result in results:
        page = open_page(browser, result.report, (1300, 1000))
        check_in_browser(page, result.report)
        page.close()


def until(page, condition: str) -> None:
    """Wait for a JavaScript condition; `wait_for_function` would evaluate a string in the page, which it forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def test_the_index_in_a_browser(scan, browser, tmp_path, make_nifti):
    """The index follows its policy, shows the previews, and its links open the reports."""
    other = make_nifti(tmp_path / "other.nii.gz", np.random.default_rng(1).normal(size=(9, 8, 7)).astype(np.float32))
    make_nifti(tmp_path / "other_dseg.nii.gz", np.ones((9, 8, 7), np.uint8))
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "other_dseg.png")
    *pages, index = make_reports([scan, other])
    page = open_page(browser, index, ready="ul a")
    assert page.locator("ul a").count() == len(pages) == 2
    until(page, "document.querySelector('img').naturalWidth === 40")
    assert page.evaluate("getComputedStyle(document.querySelector('ul')).display") == "grid"  # the style is applied
    assert page.seen["errors"] == violations(page) == []
    page.locator("ul a").first.click()
    page.wait_for_url(pages[0].resolve().as_uri())
    page.locator("table").first.wait_for(state="visible", timeout=30_000)
    assert violations(page) == []
    page.close()


def test_a_changed_page_breaks_its_policy(scan, browser, tmp_path):
    """The browser refuses an injected script, style and picture, so an empty list of violations is a finding."""
    (path,) = make_reports(scan)
    injected = '<script>window.injected = 1</script><p style="color: red">x</p><img src="https://example.org/x.png">'
    text = path.read_text(encoding="utf-8").replace("</body>", f"{injected}</body>")
    (tmp_path / "changed.html").write_text(text, encoding="utf-8")
    page = open_page(browser, tmp_path / "changed.html", ready="table")
    until(page, "window.violations.length >= 3")
    kinds = {line.split()[0] for line in violations(page)}
    assert {"script-src-elem", "style-src-attr", "img-src"} <= kinds and page.evaluate("window.injected") is None
    page.close()


def test_a_narrow_window_shows_every_choice(scan, browser):
    """At the width of a phone, in light and dark, nothing but the tables is wider than the window."""
    (path,) = make_reports(scan)
    page = open_page(browser, path, (420, 800))
    controls = page.locator("#controls input, #controls select, #controls label")
    assert controls.count() > 10
    for width in (420, 320):
        page.set_viewport_size({"width": width, "height": 800})
        for box in filter(None, (controls.nth(i).bounding_box() for i in range(controls.count()))):
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        background = pixels(page.locator("h1"))[0, -1]
        assert (background.mean() < 80) == dark
    page.close()


def test_notes_are_above_the_viewer(scan, make_nifti, tmp_path):
    values = np.random.default_rng(1).normal(size=(9, 8, 7)).astype(np.float32)
    noted = make_nifti(tmp_path / "noted.nii.gz", values)
    (result,) = segment(noted, beside_inputs=True, report=True)
    text = result.report.read_text(encoding="utf-8")
    assert any("unlike the scans that synthetic-regular was trained on" in note for note in result.notes)
    top = text[: text.index('id="stage"')]
    assert all(text.count(html.escape(note)) == top.count(html.escape(note)) == 1 for note in result.notes)


def test_without_webgl_the_page_says_so(scan, browser):
    (path,) = make_reports(scan)
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(path.resolve().as_uri())
    until(page, "document.getElementById('message').textContent.includes('WebGL 2')")
    assert page.locator("table").first.is_visible()
    page.close()


def test_shipped_viewer_is_whole():
    folder = Path(diffdiscover3d.__file__).parent / "reporting" / "viewer"
    code = gzip.decompress((folder / "niivue.js.gz").read_bytes()).decode()
    assert 2_000_000 < len(code) < 3_000_000 and "Niivue" in code and "</script" not in code.lower()
    licenses = (folder / "LICENSES.txt").read_text()
    assert "BSD 2-Clause License" in licenses and licenses.count("bundled in NiiVue") == 9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="no npm on this machine")
def test_viewer_is_what_npm_gives():
    script = Path(__file__).parent.parent.parent / "tools" / "build_viewer.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_report_needs_no_sidecar_and_is_the_same_every_time(scan, tmp_path):
    source, maps = read_nifti(scan), find_label_maps(scan)
    for name in ("one", "two"):
        write_report(tmp_path / f"{name}.html", source, scan.name, maps)
    one = (tmp_path / "one.html").read_bytes()
    assert one == (tmp_path / "two.html").read_bytes() and b"without a record" in one
