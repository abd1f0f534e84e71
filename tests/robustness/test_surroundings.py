"""Scans, disks, users and variables that once led to wrong results, and damaged files, each with the commands."""

import json
import shutil
import time

import pytest

from tests.helpers.surroundings import CASES, cell, run, train, write

pytestmark = pytest.mark.slow


def test_cases(tmp_path, count):
    wrong, skipped = {}, []
    for case in CASES:
        folder = tmp_path / case.__name__
        folder.mkdir()
        try:
            case(folder)
        except AssertionError as error:
            wrong[case.__name__] = str(error)[:500]
        except pytest.skip.Exception as reason:
            skipped.append(f"{case.__name__}: {reason}")
    right = len(CASES) - len(wrong) - len(skipped)
    count("cases", cases=len(CASES), right=right, wrong=wrong, skipped=skipped)
    assert not wrong


TORN = b'{"step": 3, "files": {"mod'
NESTED = b'{"parent":' * 50_000 + b"1" + b"}" * 50_000
KINDS = {  # the damaged file, its content, the command, and the exit codes that are right
    "sidecar of a resumed segmentation, torn": ("parts/a_dseg.json", TORN, "segment", (0,)),
    "sidecar of a resumed segmentation, nested": ("parts/a_dseg.json", NESTED, "segment", (0,)),
    "sidecar of a resumed segmentation, a list": ("parts/a_dseg.json", b"[1, 2]", "segment", (0,)),
    "sidecar of a report, torn": ("parts/a_dseg.json", TORN, "report", (0,)),
    "sidecar of a report, other types": ("parts/a_dseg.json", b'{"parts": 3, "notes": {}}', "report", (0,)),
    "label map, torn": ("parts/a_dseg.nii.gz", b"\x1f\x8b\x08\x00", "report", (3,)),
    "state of a checkpoint, torn": ("trained/checkpoints/checkpoint-00000002/state.json", TORN, "resume", (0,)),
    "state of every checkpoint": ("trained/checkpoints/checkpoint-0000000*/state.json", NESTED, "resume", (5,)),
    "weights of every checkpoint": ("trained/checkpoints/*/model.safetensors", TORN, "resume", (5,)),
    "log of a training": ("trained/log.jsonl", bytes(range(256)), "resume", (0,)),
    "options of a training": ("trained/train_config.json", TORN, "resume", (5,)),
    "configuration of a model": ("model/discovery/config.json", NESTED, "model", (5,)),
    "checksums of a model": ("model/discovery/checksums.json", TORN, "model", (5,)),
    "working grid of a model": ("model/discovery/working_grid.json", b'{"grid": "all"}', "model", (5,)),
    "domain of a model": ("model/discovery/domain.json", b'{"names": 3}', "model", (0,)),
    "plan of a discovery": ("discovered/plan.json", b'{"scans": {}}', "discover", (5,)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results, a training, a model and a plan that are intact."""
    from diffdiscover3d.hub import embedded_models

    folder = tmp_path_factory.mktemp("whole")
    write(folder / "scans" / "a.nii.gz", cell(step=3))
    assert run("segment", folder / "scans", "-o", folder / "parts").returncode == 0
    assert train(folder / "scans", folder / "trained").returncode == 0
    shutil.copytree(embedded_models()["synthetic-regular"].folder, folder / "model")
    (folder / "discovered").mkdir()
    return folder


def test_damaged_files(whole, tmp_path, count):
    wrong, slowest = {}, 0.0
    for number, (kind, (pattern, content, command, codes)) in enumerate(KINDS.items()):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        found = list(folder.glob(pattern)) or [folder / pattern]
        for path in found:
            path.write_bytes(content)
        scans, clock = folder / "scans", time.perf_counter()
        done = {
            "segment": lambda f=folder, s=scans: run("segment", s, "-o", f / "parts", "--resume"),
            "report": lambda f=folder, s=scans: run("report", s, "--parts", f / "parts"),
            "resume": lambda f=folder, s=scans: train(s, f / "trained", "--resume", "latest"),
            "model": lambda f=folder, s=scans: run("segment", s, "-o", f / "new", "--model", f / "model"),
            "discover": lambda f=folder, s=scans: run("discover", s, "-o", f / "discovered", "--resume"),
        }[command]()
        slowest = max(slowest, time.perf_counter() - clock)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode not in codes or len(errors) != (done.returncode != 0):
            wrong[kind] = {"exit_code": done.returncode, "stderr": done.stderr[-500:]}
        elif errors and not any(str(folder) in line for line in errors):
            wrong[kind] = {"not named": errors}
        elif kind.startswith("sidecar of a resumed"):
            json.loads((folder / "parts" / "a_dseg.json").read_text())["outputs"]  # made again
    count("damaged files", kinds=len(KINDS), right=len(KINDS) - len(wrong), wrong=wrong, slowest_seconds=round(slowest))
    assert not wrong
