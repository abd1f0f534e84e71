"""The examples and the README's own lines, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def scans(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(4):
        data = rng.normal(0, 0.1, (14, 10, 12)).astype(np.float32)
        data[3:9, 2:8, 3:10] += 1 + i
        nib.save(nib.Nifti1Image(data, np.diag([-1, 1, 2, 1])), folder / f"scan{i}.nii.gz")
    return folder


def run(*command, cwd):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_features_example(scans):
    out = run(sys.executable, ROOT / "examples" / "features.py", scans / "scan0.nii.gz", cwd=scans)
    assert "stage 1: (1, 64, 6, 6, 6)" in out and "(1, 16, 14, 10, 12)" in out


def test_train_on_your_folder(scans, tmp_path):
    script, output = ROOT / "examples" / "train_on_your_folder.sh", tmp_path / "out"
    run("bash", script, scans, output, "--max-steps", "2", "--batch-size", "2", "--preview-every", "2", cwd=tmp_path)
    for i in range(4):
        labels = nib.load(output / "parts" / f"scan{i}_dseg.nii.gz")
        np.testing.assert_array_equal(labels.affine, np.diag([-1, 1, 2, 1]))
        assert labels.shape == (14, 10, 12)
    assert len(list((output / "parts").glob("*.png"))) == 4


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    test_command = 'pip install -e ".[test]" && pytest -q'
    assert test_command in readme
    assert test_command in (ROOT / ".ci" / "run").read_text()
    from typer.main import get_command

    from diffdiscover3d.cli import app

    commands = set(get_command(app).commands)
    assert commands <= set(re.findall(r"`([a-z-]+)(?: [A-Z.]+| list)?`", readme))


def test_readme_python_runs(scans, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S).group(1)
    code = (
        code.replace('"scan.nii.gz"', repr(str(scans / "scan1.nii.gz")))
        + "\nprint(coarse.shape, middle.shape, fine.shape)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    shapes = [tuple(map(int, s.split(", "))) for s in re.findall(r"\[([\d, ]+)\]", out)]
    assert [s[1] for s in shapes] == [64, 32, 16] and shapes[2][2] == 4 * shapes[0][2]
