"""The harness of the speed benchmarks: ways of doing one thing timed in turns, memory in processes of their own, JSON.

Ways are timed interleaved, round after round, so that whatever else the machine does in the meantime falls on all of
them; a ratio is one of medians, and its spread the quartiles of the ratios within the rounds.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import RESULTS
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment, peak_memory_mib

ROOT = Path(__file__).parents[2]
SHARED = ("timing", "baselines", "paced", "meter")  # modules; a change in one of them makes old results stale


def interleave(
    ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every way in every round; within a round each has one turn, and the one that begins changes.

    Args:
        ways: callables without arguments.
        rounds, warmup: counted rounds, and those before them that are not counted.
        device: where they run; on "cuda" a turn ends when the device has finished.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds_of(ways[name], device)
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def seconds_of(way: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, with all work the device was given before it and by it done at the two ends."""
    synchronize(device)
    clock = time.perf_counter()
    way()
    synchronize(device)
    return time.perf_counter() - clock


def synchronize(device: str) -> None:
    """Wait until a CUDA device has done what it was given; a CPU never has anything left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def summarize(seconds: Sequence[float], flops: float | None = None) -> dict:
    """Median, quartiles and all seconds; with the operations of one call, also the rate at the median."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    summary = {"median": float(median), "quartiles": [float(low), float(high)], "seconds": list(seconds)}
    if flops:
        summary |= {"gflop": flops / 1e9, "tflop_per_second": flops / float(median) / 1e12}
    return summary


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """How many times as long the first takes: the ratio of medians, and the quartiles of the ratios round by round."""
    paired = np.asarray(slower) / np.asarray(faster)
    low, high = np.percentile(paired, [25, 75])
    return {"ratio": float(np.median(slower) / np.median(faster)), "low": float(low), "high": float(high)}


def compare(what: str, baseline: str, slower: Sequence[float], faster: Sequence[float], target: float | None = None):
    """A row of a result: our seconds against a baseline's."""
    row = {"what": what, "baseline": baseline, "measure": "time", "unit": "s"}
    row |= {"ours": float(np.median(faster)), "theirs": float(np.median(slower)), **ratio(slower, faster)}
    return judge(row, target)


def compare_memory(what: str, baseline: str, theirs: float, ours: float, target: float | None = None) -> dict:
    """A row of a result: peak memory above the inputs, in MiB, ours against a baseline's; one process each."""
    row = {"what": what, "baseline": baseline, "measure": "memory", "unit": "MiB", "ours": ours, "theirs": theirs}
    return judge(row | {"ratio": theirs / max(ours, 1.0)}, target)


def absolute(what: str, unit: str, values: Sequence[float], target: float | None = None) -> dict:
    """A row of a result that has no baseline: a median with its range, and the most it should be."""
    row = {"what": what, "measure": "absolute", "unit": unit, "value": float(np.median(values))}
    row |= {"low": float(min(values)), "high": float(max(values)), "target": target}
    return row | {"met": None if target is None else row["value"] <= target}


def judge(row: dict, target: float | None) -> dict:
    """Add the least ratio aimed at, and whether it was reached."""
    return row | {"target": target, "met": None if target is None else row["ratio"] >= target}


def module_of(name: str) -> str:
    """The module that measures a result, `benchmarks.speed.loss` for `loss`."""
    return f"benchmarks.speed.{name.replace('-', '_')}"


def run_worker(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict:
    """Run a module in its own process, so that its peak memory is its own; its last line of output is JSON."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_above(run: Callable[[], object], device: str = "cpu") -> float:
    """The most memory a call takes above what was held before it, in MiB; meant for a process of its own."""
    gc.collect()
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError):  # Linux forgets the peak of what came before, such as of the imports
        Path("/proc/self/clear_refs").write_text("5")
    before = own_peak_mib()
    run()
    return own_peak_mib() - before


def own_peak_mib() -> float:
    """The largest resident memory of this process, in MiB.

    Not `ru_maxrss` where it can be helped: on Linux that begins with the peak of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return peak_memory_mib()


def code_version(name: str) -> str:
    """A digest of the package, a benchmark's module and the shared modules; results with another digest are stale."""
    import diffdiscover3d

    package, folder = Path(diffdiscover3d.__file__).parent, Path(__file__).parent
    modules = (name.replace("-", "_"), *SHARED)
    digest = hashlib.sha256()
    for file in [*sorted(package.rglob("*.py")), *(folder / f"{module}.py" for module in modules)]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Benchmark:
    """The command line of one speed benchmark, and the JSON file it writes.

    Args:
        name: of the result, `speed-<name>.json`; on another device than the CPU `speed-<name>-<device>.json`. The
            module is `benchmarks.speed.<name>`, with underscores.
        describe: docstring of the module; the first line is the help text.
        devices: the devices it can run on.
    """

    def __init__(self, name: str, describe: str, devices: Sequence[str] = ("cpu", "cuda")):
        self.name, self.module = name, module_of(name)
        self.parser = argparse.ArgumentParser(description=describe.strip().splitlines()[0])
        self.parser.add_argument("--device", choices=devices, default=devices[0])
        self.parser.add_argument("--rounds", type=int, help="counted rounds (default: the script's own)")
        self.parser.add_argument("--seed", type=int, default=0)
        self.parser.add_argument("--quick", action="store_true", help="a short trial, kept apart from the results")
        self.parser.add_argument("--output", type=Path, help="the JSON file (default: in benchmarks/results)")
        self.parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)

    def parse(self) -> argparse.Namespace:
        """The options; the torch seed is set."""
        self.options = self.parser.parse_args()
        torch.manual_seed(self.options.seed)
        if self.options.device == "cpu":  # trainings would take a GPU where there is one
            os.environ["ACCELERATE_USE_CPU"] = "true"
        self.load_before = os.getloadavg()
        return self.options

    def worker(self, *arguments) -> dict:
        """Run this script as a worker, with the same options."""
        given = ["--device", self.options.device, "--seed", self.options.seed]
        given += ["--quick"] * self.options.quick
        return run_worker(self.module, *given, "--worker", *arguments)

    def answer(self, result: dict) -> None:
        """Print the result of a worker."""
        print(json.dumps(result))

    def write(self, rows: list[dict], settings: dict, **details) -> Path:
        """Write the result and print its rows."""
        options = self.options
        path = options.output or result_path(self.name, options.device, options.quick)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["python", "-m", self.module, *sys.argv[1:]]
        result = {
            "name": self.name,
            "command": " ".join(command),
            "device": options.device,
            "quick": options.quick,
            "seed": options.seed,
            "code": code_version(self.name),
            "settings": settings,
            "rows": rows,
            "details": details,
            "load_average_before": self.load_before,
            "load_average_after": os.getloadavg(),
            "niceness": os.nice(0),
            "environment": describe_environment(),
        }
        write_json(path, result)
        for row in rows:
            print(describe_row(row))
        print(path)
        return path


def result_path(name: str, device: str = "cpu", quick: bool = False) -> Path:
    """Path of a result; short trials go to a folder that is not committed."""
    suffix = "" if device == "cpu" else f"-{device}"
    return (RESULTS / "trials" if quick else RESULTS) / f"speed-{name}{suffix}.json"


def describe_row(row: dict) -> str:
    """One line for the terminal."""
    verdict = {None: "", True: "met", False: "MISSED"}[row.get("met")]
    target = "" if row.get("target") is None else f"target {row['target']:g} {verdict}"
    if row["measure"] == "absolute":
        return f"{row['what']}: {row['value']:.4g} {row['unit']} [{row['low']:.4g}, {row['high']:.4g}] {target}"
    spread = f" [{row['low']:.2f}, {row['high']:.2f}]" if "low" in row else ""
    figures = f"{row['theirs']:.4g} / {row['ours']:.4g} {row['unit']} = {row['ratio']:.2f}x{spread}"
    return f"{row['what']} against {row['baseline']}, {row['measure']}: {figures} {target}"
