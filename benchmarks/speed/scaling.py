"""Steps per second of both trainings with one and two processes, started as a user starts them.

    python -m benchmarks.speed.scaling

The global batch is the same; two processes share it. Three ways to use two cores take turns: one process with one
thread, one with two threads, two with one thread each. Every line of a training's log is timed as it appears, so that
imports, loading and saving are not counted; the first steps are not either.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.speed.timing import Benchmark, compare, summarize

WAYS = {  # name: (processes, threads of each)
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]
COMMON = {"preset": "small", "batch-size": 4, "log-every": 1, "preview-every": 0, "checkpoint-every": 10**6}
STAGES = {
    "diffusion": COMMON,
    "discovery": COMMON | {"num-parts": 8, "stages": 3, "teacher": "synthetic-regular", "selection": "last"},
}
WARMUP = 3


def write_volumes(folder: Path, side: int, count: int, seed: int) -> Path:
    """Small scans of noise; speed does not ask what they show. Many, so that no epoch ends while it is timed."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        data = rng.normal(0, 1, (side,) * 3).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"scan{i:03d}.nii.gz")
    return folder


def time_steps(stage: str, way: str, scans: Path, output: Path, options: dict, steps: int) -> list[float]:
    """Seconds between the lines of a training's log, those of the first steps left out."""
    processes, threads = WAYS[way]
    launch = [*LAUNCH, "--num_processes", str(processes)] if processes > 1 else []
    options = {**STAGES[stage], **options, "dataset": scans, "output-dir": output, "max-steps": WARMUP + steps + 1}
    flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    command = [sys.executable, *launch, "-m", "diffdiscover3d.train", stage, *flags, "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    log, seen = output / "log.jsonl", []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            lines = log.read_text().count("\n") if log.exists() else 0
            seen += [time.perf_counter()] * (lines - len(seen))
            time.sleep(0.005)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[:3000]}")
    # the last step also measures and saves: its line comes late
    return np.diff(seen)[WARMUP - 1 : -1].tolist()


def main() -> None:
    """Every stage: the three ways in turns."""
    benchmark = Benchmark("scaling", __doc__, devices=("cpu",))
    options = benchmark.parse()
    rounds = options.rounds or (1 if options.quick else 3)
    steps, side = (2, 24) if options.quick else (12, 50)
    smaller = {"diffusion": {"sample-size": 24}, "discovery": {}} if options.quick else {}
    rows, details = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans = write_volumes(folder / "scans", side, 4 * (WARMUP + steps + 2), options.seed)
        for stage in STAGES:
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(rounds):
                for way in WAYS:
                    output = folder / f"{stage}-{number}-{'-'.join(map(str, WAYS[way]))}"
                    seconds[way] += time_steps(stage, way, scans, output, smaller.get(stage, {}), steps)
            few = min(map(len, seconds.values()))  # lines that appear at once count as one step less
            details[stage] = {
                way: summarize(s) | {"steps_per_second": float(1 / np.median(s))} for way, s in seconds.items()
            }
            two = seconds["2 processes, 1 thread each"][:few]
            for way in ("1 process, 1 thread", "1 process, 2 threads"):
                rows.append(compare(f"{stage} step, 2 processes, 1 thread each", way, seconds[way][:few], two))
    settings = {
        "steps": steps,
        "rounds": rounds,
        "grid": side,
        "stages": STAGES,
    }
    benchmark.write(rows, settings, **details)


if __name__ == "__main__":
    main()
