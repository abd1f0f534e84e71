"""The output of `doctor` against the values of the libraries."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from diffdiscover3d import __version__
from diffdiscover3d.hub.registry import embedded_models
from diffdiscover3d.workflows import doctor as module
from diffdiscover3d.workflows.doctor import describe, examine


def test_json_of_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "diffdiscover3d.cli", "doctor", "--json", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["diffdiscover3d"] == __version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["system"]["cpu_cores"] == os.cpu_count() and found["system"]["threads"] == 1
    assert found["segment"]["device"] == "cpu" and found["cache"]["offline"] is True
    assert found["segment"]["levels"] == sorted(embedded_models()["synthetic-regular"].levels)
    assert 0 < found["memory"]["available_gib"] <= found["memory"]["total_gib"]
    cuda = [d["device"] for d in found["devices"] if d["device"].startswith("cuda")]
    assert len(cuda) == torch.cuda.device_count()
    assert list(tmp_path.iterdir()) == []


def test_text_names_the_problems(monkeypatch):
    text = describe(examine("cpu"))
    assert __version__ in text and "segment would use" in text and "device cpu" in text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 1000))
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package"))
    found = examine("cpu")
    assert len(found["problems"]) >= 2 and found["versions"]["no-such-package"] is None
    assert "pip install no-such-package" in describe(found) and "disk are free" in describe(found)


def test_device_that_is_not_there():
    with pytest.raises(ValueError, match="not available"):
        examine("cuda:99")
