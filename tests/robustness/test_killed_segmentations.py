"""SIGKILL at random moments of a segmentation that replaces results: all old or all new, and nothing is left over."""

import csv
import hashlib
import json
import random
import re
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
SCANS, COHORT_KILLS = 3, 20
COHORT_OPTIONS = {**OPTIONS, "probabilities": True, "report": True, "summary": True}
MEASURED = re.compile(rb'"(seconds|peak_memory_mib)": [0-9.]+|(?<=<td>time and memory</td><td>)[^<]*')


def replace_results(scan: Path, output: Path) -> None:
    segment(scan, output, overwrite=True, **OPTIONS)


def digests(folder: Path) -> dict[str, str]:
    """The content of every file but for the seconds and memory that were measured; with what is left over."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix in (".json", ".html"):
                content = MEASURED.sub(b"", content)
            elif path.name == "manifest.tsv":
                content = b"".join(re.sub(rb"\t[0-9.]+\t", b"\t", line) for line in content.splitlines(keepends=True))
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def test_sixty_kills(tmp_path, forkserver, count):
    scan, output = tmp_path / "scan.nii.gz", tmp_path / "out"
    volumes = [cell(index, step=2) for index in range(2)]
    expected = []
    for number, volume in enumerate(volumes):
        write(scan, volume)
        segment(scan, tmp_path / str(number), **OPTIONS)
        expected.append(digests(tmp_path / str(number)))
    assert not np.array_equal(*volumes) and expected[0].keys() == expected[1].keys()
    write(scan, volumes[0])
    segment(scan, output, **OPTIONS)
    write(scan, volumes[1])
    for _ in range(2):  # the first one waits for the server to start
        whole, clock = forkserver.Process(target=replace_results, args=(scan, output)), time.perf_counter()
        whole.start()
        whole.join()
    seconds = time.perf_counter() - clock
    assert whole.exitcode == 0 and digests(output) == expected[1]
    draw, current, outcomes, mixed, leftovers = random.Random(SEED), 1, {"old": 0, "new": 0, "ended": 0}, 0, 0
    for _ in range(KILLS):
        other = 1 - current
        write(scan, volumes[other])
        child = forkserver.Process(target=replace_results, args=(scan, output))
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


def seconds_of(folder: Path, scan: str) -> set[str]:
    """How long the run took that made each file of a scan that records it: sidecars, report and manifest."""
    sidecars = [json.loads(path.read_text())["seconds"] for path in folder.glob(f"{scan}_level-*_dseg.json")]
    report = re.search("<td>time and memory</td><td>([0-9.]+) s", (folder / f"{scan}_report.html").read_text())
    with open(folder / "manifest.tsv", encoding="utf-8") as file:
        rows = {row["scan"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert len(sidecars) == 3
    return {*map(str, sidecars), report[1], rows[scan]["seconds"]}


def segment_cohort(scans: Path, output: Path, **mode) -> None:
    segment(scans, output, **mode, **COHORT_OPTIONS)


def test_twenty_kills_and_resumes(tmp_path, forkserver, count):
    """Label maps, probabilities, tables, pictures, reports and a manifest of several scans, replaced and killed.

    After a kill the results of each scan are all old or all new; after `resume` they are all new, and those that were
    finished before have not been made again.
    """
    scans, output = tmp_path / "scans", tmp_path / "out"
    names = [f"sub-{number}" for number in range(SCANS)]

    def write_all(version: int) -> None:
        for number, name in enumerate(names):
            write(scans / f"{name}.nii.gz", cell(SCANS * version + number, step=2))

    expected = []
    for version in range(2):
        write_all(version)
        segment_cohort(scans, tmp_path / str(version))
        expected.append(digests(tmp_path / str(version)))
    assert expected[0].keys() == expected[1].keys() and len(expected[0]) == SCANS * (3 * 6 + 3) + 2

    def start(**mode):
        process = forkserver.Process(target=segment_cohort, args=(scans, output), kwargs=mode)
        process.start()
        return process

    for _ in range(2):  # the first one waits for the server to start
        clock = time.perf_counter()
        whole = start(overwrite=True)
        whole.join()
    seconds = time.perf_counter() - clock
    assert whole.exitcode == 0 and digests(output) == expected[1]
    draw, current = random.Random(SEED), 1
    outcomes = {"ended": 0, "scans_old": 0, "scans_new": 0, "scans_mixed": 0, "leftovers": 0, "made_again": 0}
    resumed = 0
    for _ in range(COHORT_KILLS):
        other = 1 - current
        write_all(other)
        child = start(overwrite=True)
        time.sleep(draw.uniform(0.1, 1.05) * seconds)
        child.kill()  # SIGKILL
        child.join()
        outcomes["ended"] += child.exitcode == 0
        recover_folder(output)
        found, finished = digests(output), {}
        for name in names:
            own = {path for path in expected[0] if path.startswith(f"{name}_")}
            seen = {path: found.get(path) for path in own}
            if seen == {path: expected[other][path] for path in own}:
                outcomes["scans_new"] += 1
                finished |= {path: (output / path).stat().st_mtime_ns for path in own}
            elif seen == {path: expected[current][path] for path in own}:
                outcomes["scans_old"] += 1
            else:
                outcomes["scans_mixed"] += 1
        again = start(resume=True)
        again.join()
        found, current = digests(output), other
        outcomes["leftovers"] += len(found.keys() - expected[other].keys())
        outcomes["made_again"] += sum((output / path).stat().st_mtime_ns != at for path, at in finished.items())
        resumed += again.exitcode == 0 and all(found.get(path) == was for path, was in expected[other].items())
        resumed -= any(len(seconds_of(output, name)) != 1 for name in names)
    outcomes |= {"of_one_run_after_resume": resumed, "whole_run_seconds": round(seconds, 2)}
    count(
        "kills of several scans with all results", kills=COHORT_KILLS, scans=SCANS, files=len(expected[0]), **outcomes
    )
    assert outcomes["scans_mixed"] == outcomes["leftovers"] == outcomes["made_again"] == 0
    assert resumed == COHORT_KILLS and outcomes["scans_old"] and outcomes["scans_new"]
