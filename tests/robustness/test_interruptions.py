"""Signals to trainings of one and two processes, to `discover`, to a segmentation: exit code 130, no partial files."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.training_runs import DIFFUSION, command, finish, hashes, log_steps, start, write_scans

pytestmark = pytest.mark.slow
STEPS = 60
LIMIT = 900  # seconds; only to end a hang, also on a busy machine


@pytest.fixture(scope="module")
def uninterrupted(scans, tmp_path_factory):
    """The hashes of a training by so many processes that is not interrupted; it is run once."""
    folder, found = tmp_path_factory.mktemp("uninterrupted"), {}

    def train(processes: int) -> dict[str, str]:
        if processes not in found:
            output = folder / str(processes)
            done = finish(command("diffusion", {**options_of(scans), "output-dir": output}, processes))
            assert done.returncode == 0, done.stderr
            found[processes] = hashes(output)
        return found[processes]

    return train


def options_of(scans, workers: int = 0) -> dict:
    options = {**DIFFUSION, "dataset": scans, "max-steps": STEPS, "preview-every": 0}
    return options | {"checkpoint-every": 1000, "num-workers": workers}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trainings(scans, uninterrupted, tmp_path, count, number, processes, workers):
    options, expected, output = options_of(scans, workers), uninterrupted(processes), tmp_path / "cut"
    arguments = command("diffusion", {**options, "output-dir": output}, processes)
    process = start(arguments)
    while log_steps(output) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, number)  # as sent by Ctrl-C and cluster managers
    _, errors = process.communicate(timeout=LIMIT)
    step = hashes(output)["step"]
    assert 5 <= step < STEPS and f"interrupted after step {step}; --resume latest goes on" in errors
    # with several processes, the exit code is that of the launcher
    assert process.returncode == 130 if processes == 1 else process.returncode != 0
    again = finish([*arguments, "--resume", "latest"])
    assert again.returncode == 0, again.stderr
    equal = hashes(output) == expected
    name = f"{number.name} to {processes} processes, {workers} loading"
    count(name, stopped_after=step, exit_code=process.returncode, resumed_bit_equal=equal)
    assert equal


def test_a_segmentation(tmp_path, count):
    data = np.random.default_rng(0).integers(0, 99, (230, 230, 200)).astype(np.uint8)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "scan.nii.gz")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffdiscover3d.cli", "segment", tmp_path / "scan.nii.gz", "-o", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    time.sleep(12)
    assert process.poll() is None, "it was over before it could be interrupted"
    process.terminate()
    out, errors = process.communicate(timeout=LIMIT)
    left = list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else []
    count("SIGTERM to segment", exit_code=process.returncode, files_left=len(left))
    assert process.returncode == 130 and out == "" and "Traceback" not in errors and left == []


def discover(scans, output) -> list:
    arguments = [sys.executable, "-m", "diffdiscover3d.cli", "discover", scans, "-o", output, "--device", "cpu"]
    return [*arguments, "--preset", "quick", "--levels", "1"]


def uninterrupted_again(training, output) -> dict[str, str]:
    """The hashes of a training with the same options, also those that were measured, that is not interrupted."""
    measured = json.loads((training / "train_config.json").read_text())
    options = {"config": training / "options.json", "output-dir": output}
    options |= {name.replace("_", "-"): measured[name] for name in ("mixed_precision", "memory_format")}
    done = finish(command("diffusion", options))
    assert done.returncode == 0, done.stderr
    return hashes(output)


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_discover(tmp_path, count, number):
    scans, output = write_scans(tmp_path / "scans", 3), tmp_path / "study #1"
    arguments = discover(scans, output)
    process = start(arguments)
    training = output / "training" / "diffusion"
    while log_steps(training) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=LIMIT)
    step = hashes(training)["step"]
    assert process.returncode == 130 and 50 <= step < 300 and "Traceback" not in errors
    assert f"interrupted after step {step}\n" in errors and "--resume latest" not in errors
    line = errors.split("go on with: ")[1].strip()
    assert shlex.split(line)[1:] == [*map(str, arguments[3:]), "--resume"]
    again = finish([*arguments[:3], *shlex.split(line)[1:]])
    assert again.returncode == 0, again.stderr
    equal = hashes(training) == uninterrupted_again(training, tmp_path / "whole")
    count(f"{number.name} to discover", stopped_after=step, exit_code=process.returncode, resumed_bit_equal=equal)
    assert equal
