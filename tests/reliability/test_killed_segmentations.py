"""SIGKILL at random moments of a segmentation that replaces results: all old or all new, and nothing is left over."""

import hashlib
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest

from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.utils.staging import recover_folder
from tests.helpers.surroundings import cell, write
from tests.helpers.training_runs import SEED

pytestmark = pytest.mark.slow
KILLS = 60
OPTIONS = {"level": "all", "preview": True, "tables": True, "statistics": True, "device": "cpu"}


def replace_results(scan: Path, output: Path) -> None:
    segment(scan, output, overwrite=True, **OPTIONS)


def digests(folder: Path) -> dict[str, str]:
    """The content of every file but for the seconds and memory in sidecars; with what is left over."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            lines = path.read_bytes().splitlines(keepends=True) if path.suffix == ".json" else [path.read_bytes()]
            content = b"".join(n for n in lines if b'"seconds"' not in n and b'"peak_memory_mib"' not in n)
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def test_sixty_kills(tmp_path, count):
    scan, output = tmp_path / "scan.nii.gz", tmp_path / "out"
    volumes = [cell(index, step=2) for index in range(2)]
    expected = []
    for number, volume in enumerate(volumes):
        write(scan, volume)
        segment(scan, tmp_path / str(number), **OPTIONS)
        expected.append(digests(tmp_path / str(number)))
    assert not np.array_equal(*volumes) and expected[0].keys() == expected[1].keys()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffdiscover3d.segmentation.driver", "monai.networks.nets", __name__])
    write(scan, volumes[0])
    segment(scan, output, **OPTIONS)
    write(scan, volumes[1])
    for _ in range(2):  # the first one waits for the server to start
        whole, clock = context.Process(target=replace_results, args=(scan, output)), time.perf_counter()
        whole.start()
        whole.join()
    seconds = time.perf_counter() - clock
    assert whole.exitcode == 0 and digests(output) == expected[1]
    draw, current, outcomes, mixed, leftovers = random.Random(SEED), 1, {"old": 0, "new": 0, "ended": 0}, 0, 0
    for _ in range(KILLS):
        other = 1 - current
        write(scan, volumes[other])
        child = context.Process(target=replace_results, args=(scan, output))
        child.start()
        time.sleep(draw.uniform(0.2, 1.1) * seconds)
        child.kill()  # SIGKILL
        child.join()
        outcomes["ended"] += child.exitcode == 0
        recover_folder(output)  # as the next command that writes to or reads from the folder does
        found = digests(output)
        leftovers += len(found.keys() - expected[0].keys())
        seen = {name: found.get(name) for name in expected[0]}
        if seen == expected[other]:
            outcomes["new"] += 1
            current = other
        elif seen == expected[current]:
            outcomes["old"] += 1
        else:
            mixed += 1
    outcomes |= {"without_mixture": KILLS - mixed, "leftovers": leftovers, "whole_run_seconds": round(seconds, 2)}
    count("kills of segmentations", kills=KILLS, **outcomes)
    assert mixed == leftovers == 0
    assert outcomes["old"] and outcomes["new"]
