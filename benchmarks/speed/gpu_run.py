"""Rows of a GPU benchmark, and how its sections time training steps and calls."""

import argparse
import contextlib
import dataclasses
import gc
import json
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.timing import synchronize
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train
from diffdiscover3d.utils.provenance import describe_environment

WARMUP, STEPS = 7, 12  # a CUDA graph is captured in the fourth step


class Finished(Exception):
    """Ends a training after its last timed step, before it writes anything."""


class Timed:
    """A task that times its steps: as a whole without synchronisation, then a few that are profiled or watched."""

    def __init__(self, task, run: "Run", profiled: bool):
        self._task, self._run, self._profiled = task, run, profiled
        self._stack = contextlib.ExitStack()
        self.found: dict = {}

    def __getattr__(self, name):
        return getattr(self._task, name)

    def __setattr__(self, name, value):
        if name.startswith("_") or name == "found":
            object.__setattr__(self, name, value)
        else:
            setattr(self._task, name, value)

    def after_step(self, step: int) -> dict[str, float]:
        shown = self._task.after_step(step)
        steps, device = self._run.steps, self._run.device
        if step == WARMUP:
            synchronize(device)
            self._run.reset_peak()
            self._clock = time.perf_counter()
        elif step == WARMUP + steps:
            self.found["host_seconds"] = (time.perf_counter() - self._clock) / steps
            synchronize(device)
            self.found["seconds"] = (time.perf_counter() - self._clock) / steps
            self.found["peak_gib"] = self._run.peak_gib()
            self.found["reserved_gib"] = self._run.reserved_gib()
            if not self._profiled:
                raise Finished
            self._warnings = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._run.watch_synchronisation(True)
        elif step == WARMUP + steps + 2:
            self._run.watch_synchronisation(False)
            self.found["waits"] = sorted(
                {f"{shorten(w.filename)}:{w.lineno} {str(w.message)[:80]}" for w in self._warnings}
            )
            self._stack.close()
            self._profile = torch.profiler.profile()
            self._profile.start()
        elif step == WARMUP + steps + 4:
            synchronize(device)
            self._profile.stop()
            self.found["profile"] = summarize_profile(self._profile, 2, device)
            raise Finished
        return shown


def shorten(path: str) -> str:
    """A file's path from the package's or site-packages' folder on."""
    parts = Path(path).parts
    starts = [i for i, part in enumerate(parts) if part in ("diffdiscover3d", "site-packages")]
    return "/".join(parts[starts[-1] :] if starts else parts[-1:])


def summarize_profile(profile, steps: int, device: str) -> dict:
    """Milliseconds of a step by kernel on a GPU, or by operator on a CPU, the longest first."""
    on_gpu = device.startswith("cuda")
    kernels: dict[str, list[float]] = {}
    for event in profile.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu != is_kernel:
            continue
        used = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entry = kernels.setdefault(event.key[:110], [0.0, 0])
        entry[0] += used / 1e3 / steps
        entry[1] += event.count / steps
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "ms": sum(v[0] for v in kernels.values()),
        "launches": sum(v[1] for v in kernels.values()),
        "longest": [{"name": k, "ms": round(v[0], 3), "count": v[1]} for k, v in longest[:40]],
    }


class Run:
    """Options of a run, and the file its rows are written to."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.quick, self.options = options.device, options.quick, options
        self.steps = 2 if options.quick else STEPS
        self.started = time.perf_counter()
        self.result = {
            "name": "gpu",
            "command": " ".join(["python", "-m", "benchmarks.speed.gpu", *sys.argv[1:]]),
            "device": options.device,
            "quick": options.quick,
            "environment": describe_environment(),
            "torch": torch.__version__,
            "rows": [],
            "details": {},
            "errors": {},
        }
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.result["gpu"] = {"name": properties.name, "memory_gib": properties.total_memory / 2**30}

    def row(self, what: str, value: float, unit: str, target: float | None = None, **more) -> None:
        """Add a row; `target` is the most the value should be, or with `at_least=True` the least."""
        met = None
        if target is not None:
            met = value >= target if more.get("at_least") else value <= target
        row = {"what": what, "value": float(f"{value:.5g}"), "unit": unit, "target": target, "met": met, **more}
        self.result["rows"].append(row)
        print(f"[{time.perf_counter() - self.started:5.0f} s] {what}: {value:.4g} {unit} {more}", flush=True)
        self.write()

    def detail(self, name: str, value) -> None:
        self.result["details"][name] = value
        self.write()

    def write(self) -> None:
        path = Path(self.options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.result["seconds"] = time.perf_counter() - self.started
        path.write_text(json.dumps(self.result, indent=1))

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.budget - (time.perf_counter() - self.started)

    def section(self, name: str, function: Callable, *arguments, limit: int | None = None) -> None:
        """Run a section unless the time is up or others were asked for; an error ends the section only.

        Args:
            limit: seconds after which the section is stopped.
        """
        wanted = self.options.sections
        if (wanted and name not in wanted) or self.left() < 0:
            return
        clock = time.perf_counter()
        try:
            with time_limit(limit):
                function(self, *arguments)
        except Exception as error:
            self.result["errors"][name] = "".join(traceback.format_exception(error))[-3000:]
            print(f"{name} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.detail(f"seconds of {name}", round(time.perf_counter() - clock, 1))

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None

    def reserved_gib(self) -> float | None:
        """What the process holds, the memory of CUDA graphs included."""
        return torch.cuda.memory_reserved() / 2**30 if self.device == "cuda" else None

    def watch_synchronisation(self, enabled: bool) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if enabled else "default")


@contextlib.contextmanager
def time_limit(seconds: int | None):
    """Raise `TimeoutError` in the context after some seconds, between two lines of Python; `None`: never."""

    def stop(*_) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds or 0)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def median_seconds(run: Run, way: Callable, rounds: int, warmup: int = 2) -> float:
    """Median seconds of a call, timed by events on a GPU."""
    for _ in range(warmup):
        way()
    seconds = []
    for _ in range(rounds):
        if run.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            clock = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - clock)
    return float(np.median(seconds))


@contextlib.contextmanager
def exact_float32():
    """Switch TF32 off."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def time_training(run: Run, name: str, make_task: Callable, config, volumes, target=None, profiled=False) -> dict:
    """A row of the milliseconds of a step of the package's own loop; its details if it is profiled."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, max_steps=10**6, output_dir=str(Path(folder) / "training"))
        accelerator = make_accelerator(config)
        clock = time.perf_counter()
        task = Timed(make_task(config, accelerator), run, profiled)
        with contextlib.suppress(Finished):
            train(task, config, volumes, accelerator)
    found = task.found
    details = {"host_ms": 1e3 * found["host_seconds"], "peak_gib": found["peak_gib"]}
    details["reserved_gib"] = found["reserved_gib"]
    details["seconds_in_all"] = time.perf_counter() - clock
    run.row(name, 1e3 * found["seconds"], "ms", target, **{k: v and round(v, 2) for k, v in details.items()})
    if profiled:
        run.detail(name, {k: found[k] for k in ("waits", "profile")})
    return found
