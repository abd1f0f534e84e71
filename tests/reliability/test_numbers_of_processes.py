"""One, two and four processes: the same volumes and noise in each step, and the same weights but for rounding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import DIFFUSION, DISCOVERY, command, finish, write_scans

pytestmark = pytest.mark.slow
STEPS = 50
SCRIPT = str(Path(__file__).parent / "traced_training.py")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def teacher(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    options = {**DIFFUSION, "dataset": scans, "output-dir": output, "max-steps": 3, "preview-every": 0}
    assert finish(command("diffusion", options)).returncode == 0
    return output


def train(stage, options, folder, processes):
    output, trace = folder / str(processes), folder / f"trace{processes}"
    trace.mkdir()
    options = {**options, "output-dir": output, "max-steps": STEPS, "preview-every": 0}
    done = finish(command(stage, options, processes, SCRIPT), TRACE=str(trace))
    assert done.returncode == 0, done.stderr
    files = sorted(trace.iterdir())
    assert len(files) == processes
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    weights = load_file(output / "checkpoints" / f"checkpoint-{STEPS:08d}" / "model.safetensors")
    return sorted(rows, key=lambda row: (row["step"], row["slot"])), weights


@pytest.mark.parametrize("stage", ["diffusion", "discovery"])
def test_weights_after_fifty_steps(scans, teacher, tmp_path, count, stage):
    if stage == "diffusion":
        # two channels a group: a bias before a norm of single channels has no gradient but rounding, which Adam
        # would blow up to whole steps
        options = {**DIFFUSION, "width": 16, "dataset": scans}
    else:  # with dropout; batch norm would see each process's volumes apart
        options = {**DISCOVERY, "norm": "instance", "teacher": teacher, "stages": (1, 2), "dataset": scans}
    options |= {"lr-schedule": "constant", "learning-rate": 1e-4}
    rows, weights = train(stage, options, tmp_path, 1)
    assert len(rows) == 4 * STEPS and {(r["step"], r["slot"]) for r in rows} == {
        (step, slot) for step in range(STEPS) for slot in range(4)
    }
    for processes in (2, 4):
        others, other_weights = train(stage, options, tmp_path, processes)
        largest = max(float((w.double() - other_weights[k].double()).abs().max()) for k, w in weights.items())
        moved = {k: float((w - other_weights[k]).abs().max()) for k, w in weights.items()}
        worst = max(moved, key=moved.get)
        count(
            f"{stage}, 1 against {processes} processes",
            steps=STEPS,
            samples=len(rows),
            same_samples_and_noise=rows == others,
            largest_difference_of_a_weight=largest,
            of=worst,
        )
        assert rows == others
        assert torch.isfinite(torch.tensor(largest)) and largest <= 1e-6
