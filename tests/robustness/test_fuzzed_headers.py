"""Ten thousand damaged headers in a process limited to 1 GiB: each is read or rejected with a package error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training_runs import SEED

pytestmark = pytest.mark.slow


def test_ten_thousand_headers(tmp_path, count):
    script = Path(__file__).parents[1] / "helpers" / "fuzz_headers.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "10000", str(SEED)], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads(done.stdout)
    count("fuzzed headers", **figures)
    assert figures["headers"] >= 10_000 and figures["slowest_seconds"] < 2 and figures["unexpected"] == []
    assert figures["refused"] > 1000 and figures["read"] > 100  # some headers are refused and some are read
