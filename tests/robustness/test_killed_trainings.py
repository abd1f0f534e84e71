"""Trainings killed at random points and during checkpoint writes, then resumed: bit-equal to an uninterrupted one."""

import os
import random
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from diffdiscover3d.train import main
from diffdiscover3d.utils.signals import interrupt_on_termination
from tests.helpers.training_runs import DIFFUSION, DISCOVERY, SEED, command, hashes, log_steps

pytestmark = pytest.mark.slow
STEPS = 14
LIMIT = 900  # seconds; only to end a hang
KILLS = 15  # per phase; every third during a checkpoint write


def options_of(stage, scans, teacher, output, **more):
    options = {"dataset": scans, "output-dir": output, "max-steps": STEPS, "preview-every": 0}
    if stage == "diffusion":  # wide, so that writing a checkpoint takes some time
        return {**DIFFUSION, "width": 24, **options, **more}
    return {**DISCOVERY, "norm": "batch", "teacher": teacher, "stages": (1, 2), **options, **more}


def run_training(arguments: list[str]) -> None:
    """What `python -m diffdiscover3d.train` does."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    with interrupt_on_termination():
        sys.exit(main(arguments))


def start(forkserver, command: list[str]):
    process = forkserver.Process(target=run_training, args=(command[3:],))
    process.start()
    return process


def exit_code(process) -> int:
    process.join(LIMIT)
    return process.exitcode


def half_written(output) -> list:
    return list((output / "checkpoints").glob(".diffdiscover3d-file.*"))


def kill_somewhere(process, output, rng, inside_write: bool) -> dict:
    """Kill a training and return its state at that time; it is not "alive" if it finished before."""
    wanted, deadline = rng.randrange(0, STEPS - 1), time.time() + LIMIT
    while log_steps(output) < wanted and process.is_alive() and time.time() < deadline:
        time.sleep(0.001)
    if inside_write:
        while not half_written(output) and process.is_alive() and time.time() < deadline:
            time.sleep(0.0002)
    else:
        time.sleep(rng.uniform(0, 0.1))
    process.kill()
    return {"alive": exit_code(process) == -9, "steps": log_steps(output), "inside": bool(half_written(output))}


@pytest.mark.parametrize("stage", ["diffusion", "discovery"])
def test_every_resume_is_bit_equal(scans, teacher, tmp_path, forkserver, count, stage):
    whole = tmp_path / "whole"
    assert exit_code(start(forkserver, command(stage, options_of(stage, scans, teacher, whole)))) == 0
    expected = hashes(whole)
    name = "unet/diffusion_pytorch_model.safetensors" if stage == "diffusion" else "diffusion_pytorch_model.safetensors"
    weights = load_file(whole / name)

    rng, kills, equal, attempts = random.Random(f"{SEED} {stage}"), [], 0, 0
    while len(kills) < KILLS:
        attempts += 1
        assert attempts < 3 * KILLS, "the training is over before it can be killed"
        output = tmp_path / f"killed{attempts}"
        workers = 1 if len(kills) % 5 == 4 else 0
        more = {"checkpoint-every": rng.choice((1, 2, 5)), "num-workers": workers}
        arguments = command(stage, options_of(stage, scans, teacher, output, **more))
        where = kill_somewhere(start(forkserver, arguments), output, rng, inside_write=len(kills) % 3 == 0)
        if not where["alive"]:
            continue
        kills.append(where)
        assert exit_code(start(forkserver, [*arguments, "--resume", "latest"])) == 0
        final = load_file(output / name)
        equal += hashes(output) == expected and all((final[k] == w).all() for k, w in weights.items())
        assert not half_written(output)
        assert [p.name for p in output.iterdir() if p.name.startswith(".")] == [".lock"]
    inside = sum(k["inside"] for k in kills)
    steps = sorted(k["steps"] for k in kills)
    count(f"SIGKILLs, {stage}", kills=len(kills), inside_a_write=inside, steps_done=steps, resumed_bit_equal=equal)
    assert equal == KILLS and inside >= 3
