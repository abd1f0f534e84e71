"""The app as a Hugging Face Space: its header, its requirements, and its start as a Space starts it."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


def test_header_and_requirements():
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import SpaceCard
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    header = SpaceCard.load(SPACE / "README.md").data
    assert (SPACE / header.app_file).is_file() and header.sdk == "gradio" and header.license == "apache-2.0"
    (gradio,) = (Requirement(line) for line in project["optional-dependencies"]["app"])
    assert gradio.name == "gradio" and header.sdk_version in gradio.specifier
    assert header.python_version in SpecifierSet(project["requires-python"])
    assert len(header.short_description) <= 60
    (required,) = (SPACE / "requirements.txt").read_text().splitlines()
    required = Requirement(required)
    assert required.name == project["name"] and required.extras <= project["optional-dependencies"].keys()
    assert "app" in required.extras and required.url == f"git+{project['urls']['Repository']}"


@pytest.mark.slow
def test_it_starts_on_the_port_of_the_space(tmp_path):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "diffdiscover3d[app]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port)}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert re.match(rf"The app is running on http://[\w.]+:{port}/ ", line), line
        # the address by which a Space is reached is not that of this machine
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "user-name.hf.space"})
        with urllib.request.urlopen(request, timeout=30) as page:
            assert "diffdiscover3d" in page.read().decode()
        assert list(tmp_path.glob("diffdiscover3d-app-*"))
    finally:
        process.terminate()
        process.wait(timeout=60)
    end = time.monotonic() + 10
    while list(tmp_path.glob("diffdiscover3d-app-*")):
        assert time.monotonic() < end
        time.sleep(0.1)
