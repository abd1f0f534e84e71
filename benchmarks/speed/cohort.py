"""A cohort of tiny scans by two processes: memory over the run, a kill and its completion.

python -m benchmarks.speed.cohort > benchmarks/results/cohort.json
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMAND = "python -m benchmarks.speed.cohort"
SHAPES = [(20, 16, 12), (18, 21, 15), (24, 14, 17), (16, 16, 22), (22, 19, 13)]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]


def main() -> None:
    """Run both parts in a temporary folder and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        record_memory(*map(Path, arguments.worker))
        return
    from diffdiscover3d.utils.provenance import describe_environment

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scans(root / "scans", arguments.scans, arguments.seed)
        result = {
            "command": COMMAND,
            "scans": arguments.scans,
            "shapes": SHAPES,
            "processes": arguments.processes,
            "seed": arguments.seed,
            "memory": measure_memory(root, arguments.processes),
            "killed": kill_and_complete(root, arguments.processes),
            "environment": describe_environment(),
        }
    print(json.dumps(result, indent=2))


def write_scans(folder: Path, count: int, seed: int) -> None:
    """Noise with a bright box, in several shapes."""
    import nibabel as nib

    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        data = rng.normal(0, 0.1, SHAPES[index % len(SHAPES)]).astype(np.float32)
        data[4:12, 3:11, 3:10] += 1
        nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), folder / f"sub-{index:04d}.nii.gz")


def record_memory(scans: Path, output: Path, log: Path) -> None:
    """In a process of the launch: segment, and write the resident memory after every scan."""
    import psutil

    from diffdiscover3d import segment

    process, rank = psutil.Process(), os.environ["RANK"]
    with open(log / f"{rank}.txt", "w") as file:
        segment(scans, output, summary=True, on_done=lambda _: print(process.memory_info().rss, file=file, flush=True))


def measure_memory(root: Path, processes: int) -> dict:
    """Resident memory of each process, in the first and the last tenth of its scans."""
    log = root / "memory"
    log.mkdir()
    clock = time.perf_counter()
    worker = ["benchmarks.speed.cohort", "--worker", root / "scans", root / "whole", log]
    run = subprocess.run(launch(processes, worker), env=environment(), capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    rows = []
    for path in sorted(log.iterdir()):
        mib = np.array([int(line) for line in path.read_text().split()]) / 2**20
        tenth = max(1, len(mib) // 10)
        first, last = mib[:tenth].mean(), mib[-tenth:].mean()
        rows.append(
            {
                "scans": len(mib),
                "first_tenth_mib": round(float(first), 1),
                "last_tenth_mib": round(float(last), 1),
                "growth_percent": round(float(100 * (last / first - 1)), 2),
                "largest_mib": round(float(mib.max()), 1),
            }
        )
    return {"seconds": round(time.perf_counter() - clock, 1), "processes": rows}


def kill_and_complete(root: Path, processes: int) -> dict:
    """Kill all processes after a third of the scans, run the command again, and check the manifest."""
    output, total = root / "killed", len(list((root / "scans").iterdir()))
    command = ["diffdiscover3d.cli", "segment", root / "scans", "-o", output, "--summary", "--resume", "--quiet"]
    first = subprocess.Popen(
        launch(processes, command), env=environment(), start_new_session=True, stderr=subprocess.DEVNULL
    )
    while first.poll() is None and len(list(output.glob("*_dseg.json"))) < total / 3:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finished = len(list(output.glob("*_dseg.json")))
    clock = time.perf_counter()
    second = subprocess.run(launch(processes, command), env=environment(), capture_output=True, text=True)
    if second.returncode:
        sys.exit(second.stderr)
    manifest, parts, whole = read(output / "manifest.tsv"), read(output / "parts.tsv"), read(root / "whole/parts.tsv")
    return {
        "signal": "SIGKILL to all processes",
        "finished_before": finished,
        "seconds_to_complete": round(time.perf_counter() - clock, 1),
        "rows": len(manifest),
        "done": sum(row["status"] == "done" for row in manifest),
        "distinct_scans": len({row["scan"] for row in manifest}),
        "hashes_of_the_scans": sum(
            row["input_sha256"] == hashlib.sha256((root / "scans" / row["input"]).read_bytes()).hexdigest()
            for row in manifest
        ),
        "parts_equal_those_of_an_uninterrupted_run": parts == whole,
        "rows_of_parts": len(parts),
        "left_over_files": len([p for p in output.iterdir() if p.name.startswith(".")]),
    }


def launch(processes: int, module: list) -> list[str]:
    """The command line of `accelerate launch` for a module and its arguments."""
    return [str(word) for word in [*LAUNCH[:-1], "--num_processes", processes, LAUNCH[-1], *module]]


def environment() -> dict[str, str]:
    """Variables for gloo processes on a CPU, one thread each."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def read(path: Path) -> list[dict]:
    """The rows of a table."""
    return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))


if __name__ == "__main__":
    main()
