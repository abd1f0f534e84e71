"""The lock on the folder of a training, with holders that are killed; launched trainings that must end."""

import contextlib
import random
import time

import psutil
import pytest

from tests.helpers.training_runs import DIFFUSION, SEED, command, finish, hashes, log_steps, start, write_scans

pytestmark = pytest.mark.slow
KILLS, LAUNCHES, STEPS, LIMIT = 4, 6, 200, 900
OPTIONS = {**DIFFUSION, "max-steps": STEPS, "checkpoint-every": 10, "preview-every": 0}


def wait_for(output, steps: int, process) -> None:
    while log_steps(output) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def family(process) -> list[psutil.Process]:
    """A process and all that it has launched."""
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


def refusal(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if "another process is writing to this folder" in line]


@pytest.mark.parametrize("processes", [1, 2])
def test_one_training_writes_to_a_folder(tmp_path, count, processes):
    """A second training is refused before it reads its data; a killed one leaves the folder to the next."""
    options = {**OPTIONS, "dataset": write_scans(tmp_path / "scans")}
    assert finish(command("diffusion", {**options, "output-dir": tmp_path / "whole"}, processes)).returncode == 0
    output, draw = tmp_path / "out", random.Random(SEED)
    arguments = [*command("diffusion", {**options, "output-dir": output}, processes), "--resume", "latest"]
    unreadable = {**options, "dataset": tmp_path / "absent", "output-dir": output}
    refused, went_on, refusal_seconds = 0, 0, 0.0
    for _ in range(kills := KILLS // processes):
        holder = start(arguments)
        wait_for(output, log_steps(output) + 1, holder)
        members = family(holder)
        for member in members:  # it must not end while the second one starts
            member.suspend()
        clock = time.perf_counter()
        second = finish([*command("diffusion", unreadable, processes), "--resume", "latest"])
        refusal_seconds = max(refusal_seconds, time.perf_counter() - clock)
        refused += second.returncode != 0 and len(refusal(second)) == 1 and "absent" not in second.stderr
        before = log_steps(output)
        for member in members:
            member.resume()
        wait_for(output, before + 1, holder)
        went_on += 1
        time.sleep(draw.uniform(0, 0.1))
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, LIMIT)
        holder.communicate()
    after = finish(arguments)
    assert after.returncode == 0, after.stderr
    equal = hashes(output) == hashes(tmp_path / "whole")
    count(
        f"lock of a training of {processes} processes",
        kills=kills, second_refused=refused, first_went_on=went_on, resumed_bit_equal=equal,
        slowest_refusal_seconds=round(refusal_seconds, 1),
    )  # fmt: skip
    assert refused == went_on == kills and equal


def test_launched_trainings_end(tmp_path, count):
    """Trainings of two processes end once their process group is destroyed, and so do those that fail."""
    options = {**OPTIONS, "dataset": write_scans(tmp_path / "scans"), "max-steps": 2}
    codes, slowest = [], 0.0
    for number in range(LAUNCHES):
        clock = time.perf_counter()
        workers = {"num-workers": number % 2, "output-dir": tmp_path / str(number)}
        codes.append(finish(command("diffusion", options | workers, 2)).returncode)
        slowest = max(slowest, time.perf_counter() - clock)
    failed = finish(command("diffusion", {**options, "dataset": tmp_path / "absent", "output-dir": tmp_path / "no"}, 2))
    count(
        "launched trainings of two processes",
        launches=LAUNCHES, ended_with_0=codes.count(0), slowest_seconds=round(slowest, 1),
        exit_code_of_one_that_fails=failed.returncode,
    )  # fmt: skip
    assert codes == [0] * LAUNCHES and failed.returncode != 0 and "absent" in failed.stderr
    assert not (tmp_path / "no").exists()
