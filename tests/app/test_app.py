"""The app through its API: results, messages, limits, and what it refuses."""

import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffdiscover3d.app import jobs, server
from diffdiscover3d.cli.app import app
from diffdiscover3d.errors import DiffDiscoverError, OutputError

OBLIQUE = np.array([[0, -1.9, 0.3, 30.0], [0, 0.4, 2.9, -12.0], [-1.5, 0, 0, 44.0], [0, 0, 0, 1]])
BOXES = np.random.default_rng(2).normal(0, 0.05, (18, 15, 12)).astype(np.float32)
BOXES[4:14, 3:12, 2:9] += 1
CONNECTIONS: list[tuple] | None = None  # while the app runs, the addresses that this process connects to


def _record(event: str, arguments: tuple) -> None:
    if CONNECTIONS is not None and event == "socket.connect":
        CONNECTIONS.append(arguments[1])
    elif CONNECTIONS is not None and event == "socket.getaddrinfo":
        CONNECTIONS.append(arguments[:2])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Address and folder of a running app that takes 1 MB."""
    global CONNECTIONS
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "diffdiscover3d[app]"')
    sys.addaudithook(_record)
    CONNECTIONS = []
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    try:
        with server.running_app(max_size_mb=1, device="cpu") as url:
            (root,) = Path(tempfile.tempdir).glob("diffdiscover3d-app-*")
            yield url, root
        assert not root.exists()
        assert {address[0] for address in CONNECTIONS} <= {"127.0.0.1", "localhost", None} and CONNECTIONS
    finally:
        tempfile.tempdir, CONNECTIONS = before, None


def make_client(url: str, folder: Path):
    """A client of the app. It calls the Hub when it is made, which is not the app's doing and not recorded."""
    global CONNECTIONS
    from gradio_client import Client

    recorded, CONNECTIONS = CONNECTIONS, None
    try:
        return Client(url, download_files=str(folder), verbose=False, analytics_enabled=False)
    finally:
        CONNECTIONS = recorded


@pytest.fixture
def client(running, tmp_path):
    return make_client(running[0], tmp_path / "downloads")


def find_parts(client, *paths, model="synthetic-regular", level="all", fast=False, volume=None):
    from gradio_client import handle_file

    return client.predict([handle_file(p) for p in paths], model, level, fast, volume, "", "", api_name="/find_parts")


def files_of_the_command(path: Path, output: Path, *options: str) -> dict[str, bytes]:
    done = CliRunner().invoke(app, ["segment", str(path), "-o", str(output), *options])
    assert done.exit_code == 0, done.output
    return {p.name: p.read_bytes() for p in output.iterdir()}


def test_results_are_those_of_the_command(client, make_nifti, tmp_path):
    path = make_nifti(tmp_path / "scan (1).nii.gz", BOXES, OBLIQUE)
    expected = files_of_the_command(path, tmp_path / "parts", "--level", "all", "--report")
    view, notes, table, files = find_parts(client, path)
    found = {Path(p).name: Path(p).read_bytes() for p in files}
    assert found.keys() == expected.keys() and len(found) == 3 * 3 + 2
    for name in found:
        if not name.endswith((".json", ".html")) or name.endswith("_tree.json"):  # these record the time needed
            assert found[name] == expected[name], name
    assert table["headers"][:3] == ["level", "index", "name"]
    assert [row[0] for row in table["data"]] == ["1"] * 2 + ["2"] * 4 + ["3"] * 8
    voxels = table["headers"].index("voxels")
    assert sum(int(row[voxels]) for row in table["data"] if row[0] == "3") == BOXES.size
    assert view.startswith("<iframe") and 'sandbox="allow-scripts"' in view and "Done in" in notes
    sidecar = json.loads(found["scan (1)_level-2_dseg.json"])
    assert sidecar["input"]["name"] == path.name and str(tmp_path) not in json.dumps(sidecar)


def test_a_tiff_and_a_broken_file(client, running, tmp_path):
    from gradio_client.exceptions import AppError

    tifffile = pytest.importorskip("tifffile")
    stack = np.round(100 * (BOXES.T - BOXES.min())).astype(np.uint16)
    tifffile.imwrite(tmp_path / "cells.tif", stack, imagej=True, metadata={"axes": "ZYX", "spacing": 2, "unit": "um"})
    expected = files_of_the_command(tmp_path / "cells.tif", tmp_path / "parts", "--level", "1")
    *_, files = find_parts(client, tmp_path / "cells.tif", level=1)
    found = {Path(p).name: Path(p).read_bytes() for p in files}
    assert found["cells_dseg.tif"] == expected["cells_dseg.tif"]

    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"<html>Not found</html>")
    with pytest.raises(AppError) as caught:
        find_parts(client, broken)
    message = str(caught.value)
    assert message.startswith("broken.nii.gz: ") and "web page" in message and "\n" not in message
    assert str(running[1]) not in message and "Traceback" not in message
    with pytest.raises(AppError, match="there is no volume yet"):
        find_parts(client)


def test_files_of_the_machine_stay_unread(client, running, make_nifti, tmp_path):
    import httpx
    from gradio_client.exceptions import AppError

    secret = make_nifti(tmp_path / "secret.nii.gz", BOXES)
    with pytest.raises(AppError, match="not in the list of choices"):
        find_parts(client, secret, model=str(tmp_path))
    url, root = running
    with httpx.Client(base_url=url, trust_env=False) as http:

        def call(path: str | Path) -> str:
            given = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            data = [[given], "synthetic-regular", "all", False, None, "", ""]
            event = http.post("/gradio_api/call/find_parts", json={"data": data}).json()["event_id"]
            return http.get(f"/gradio_api/call/find_parts/{event}").text

        posted = http.post("/gradio_api/upload", files={"files": ("scan.nii.gz", secret.read_bytes())}).json()
        uploaded = Path(posted[0])
        assert "event: complete" in call(uploaded)
        for path in (secret, Path("/etc/passwd"), uploaded.parent / os.path.relpath(secret, uploaded.parent)):
            answer = call(path)
            assert "event: error" in answer and "complete" not in answer
        assert "event: error" in call("https://example.org/scan.nii")
        for path in (
            "http://example.org",
            secret,
            "/etc/passwd",
            root / ".." / ".." / secret.name,
            Path(__file__),
            root.parent,
        ):
            assert http.get(f"/gradio_api/file={path}").status_code in (403, 404), path
        page = http.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", page.text)
        assert http.get("/", headers={"host": "example.org"}).status_code == 400
        large = http.post("/gradio_api/upload", files={"files": ("a.nii", bytes(2**20 + 1))})
        assert large.status_code == 413 and "maximum allowed size" in large.text
        assert not list(root.rglob("a.nii"))


def test_one_job_at_a_time(running, make_nifti, tmp_path, monkeypatch):
    spans, segment = [], jobs.segment

    def timed(*arguments, **options):
        start = time.monotonic()
        time.sleep(0.2)
        result = segment(*arguments, **options)
        spans.append((start, time.monotonic()))
        return result

    monkeypatch.setattr(jobs, "segment", timed)
    path = make_nifti(tmp_path / "scan.nii.gz", BOXES)
    clients = [make_client(running[0], tmp_path / str(n)) for n in range(2)]
    threads = [threading.Thread(target=find_parts, args=(one, path), kwargs={"level": 1}) for one in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (_, first_end), (second_start, _) = sorted(spans)
    assert first_end <= second_start
    # equal uploads of two pages are one file; each page has results of its own
    assert len(list((running[1] / "results").glob("job-*/parts/scan_dseg.nii.gz"))) == 2


def test_a_port_that_is_taken_is_one_line(running):
    port = int(running[0].rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(OutputError, match=f"port {port} is not free .* --port"), server.running_app(port=port):
        pytest.fail("it was started twice")


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["app"])
    assert isinstance(result.exception, DiffDiscoverError)
    assert str(result.exception) == 'the app needs gradio: pip install "diffdiscover3d[app]"'


def test_unknown_models_and_devices_are_refused_at_the_start():
    pytest.importorskip("gradio")
    for options, message in (
        (["-m", "no-model"], "no such folder"),
        (["--device", "tpu"], "`device` must be"),
        (["--max-size", "0"], ""),
    ):
        result = CliRunner().invoke(app, ["app", *options])
        assert result.exit_code and (message in str(result.exception) or not message)
