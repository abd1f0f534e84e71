"""Small trainings in subprocesses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

SEED = 20261123  # random seed of the slow suite
GRID = (10, 8, 12)
DIFFUSION = {"preset": "small", "width": 8, "sample-size": 8, "mixed-precision": "no", "batch-size": 4, "log-every": 1}
DISCOVERY = {"preset": "small", "mixed-precision": "no", "batch-size": 4, "num-parts": 3, "log-every": 1}
for _options in (DIFFUSION, DISCOVERY):  # fixed, because measurements vary on a busy machine
    _options["memory-format"] = "channels_last"
LAUNCHER = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHER += ["--dynamo_backend", "no", "--main_process_port", "0"]


def write_scans(folder: Path, count: int = 6) -> Path:
    """Noisy balls of different sizes and intensities."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID], indexing="ij")
    for i in range(count):
        ball = ((x**2 + y**2 + z**2) < rng.uniform(0.3, 0.8)) * rng.uniform(1, 2)
        data = (ball + rng.normal(0, 0.1, GRID)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([1, 2, 1.5, 1])), folder / f"scan{i}.nii.gz")
    return folder


def command(stage: str, options: dict, processes: int = 1, module: str = "diffdiscover3d.train") -> list[str]:
    """The command line of a training; `module` may be a replacement script."""
    target = ["-m", module] if not module.endswith(".py") else [module]
    launch = ["-m", *LAUNCHER, "--num_processes", str(processes), *target] if processes > 1 else target
    flags = [str(x) for k, v in options.items() for x in (f"--{k}", *(v if isinstance(v, tuple) else (v,)))]
    return [sys.executable, *launch, stage, *flags]


def start(arguments: list[str], **environment) -> subprocess.Popen:
    """Start the command in a new session, so that signals to it or its group reach no other process."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(arguments: list[str], timeout: float = 900, **environment) -> subprocess.CompletedProcess:
    process = start(arguments, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # also those that it has launched
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def hashes(output: Path) -> dict[str, str]:
    """The sha256 of each part of the newest checkpoint: weights, optimiser, moving average, selected epoch."""
    newest = max((output / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    return {"step": state["step"], **state["files"]}


def log_steps(output: Path) -> int:
    log = output / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0
