"""Every file of the corpus with the segment command and its embedded model, each in a subprocess."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.corpus import CORPUS

pytestmark = pytest.mark.slow
REMEDY = re.compile(
    r"copy|convert|rename|download|choose|give|resample|rescale|mend|--nan-to-zero|--ignore-affine|--volume|git lfs|"
    r"must end in|no such file"
)


def test_corpus(tmp_path, count):
    wrong = {}
    for number, (name, (write, expected)) in enumerate(CORPUS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, out = folder / name, folder / "out"
        write(path)
        done = subprocess.run(
            [sys.executable, "-m", "diffdiscover3d.cli", "segment", path, "--output", out],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        written = sorted(p.name for p in out.iterdir()) if out.exists() else []
        problems = []
        if done.returncode != expected:
            problems.append(f"exit code {done.returncode}, expected {expected}: {done.stderr}")
        if "Traceback" in done.stderr:
            problems.append("traceback")
        if expected and written:
            problems.append(f"left {written}")
        if not expected and len(written) != 3:  # label map, provenance, table of parts
            problems.append(f"wrote {written}")
        if expected:
            lines = done.stderr.splitlines()
            if len(lines) != 1 or str(path) not in lines[0] or not REMEDY.search(lines[0].split(str(path))[-1]):
                problems.append(f"message {done.stderr!r}")
        if problems:
            wrong[name] = problems
    refused = sum(expected != 0 for _, expected in CORPUS.values())
    count("corpus", files=len(CORPUS), to_be_refused=refused, as_expected=len(CORPUS) - len(wrong), wrong=wrong)
    assert not wrong
