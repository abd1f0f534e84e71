"""Each convention of diffusers, accelerate and datasets, as a user writes it: see `tests/helpers/diffusers_user.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.loopback_hub import LoopbackHub

pytest.importorskip("datasets")


def test_a_script_of_a_diffusers_user(tmp_path):
    (tmp_path / "scans").mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.diffusers_user", str(tmp_path / "scans")],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**clean, **hub.environment(tmp_path / "hub"), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "all conventions hold"
        assert "model_index.json" in hub.repos["models", "user/cells"].files("main")
