"""Where the time goes and where it need not: every part of a step beside the least time the machine allows.

    python -m benchmarks.speed.budget

Peaks are measured first: matrix products and 3D convolutions in float32 and bfloat16, copies of memory. Then the
package's own training loop runs three times: with a clock at the borders of the parts, with a meter that counts
operations and bytes for the same parts, and under torch's profiler for the operators. The least time of a part is the
sum over its operators of the longer of computing and moving at the measured peaks: each operator alone, reading its
inputs and writing its outputs once. What fuses operators, or finds its inputs in a cache, can be better than that.

The largest gap is the part with the most seconds above its least time. The estimate of the paper's recipe on a GPU
is one: see paper_cost.py.
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.speed.diffusion_step import BATCH
from benchmarks.speed.discovery_step import GRID, make_config, make_task
from benchmarks.speed.meter import Meter, measure_peaks, watched
from benchmarks.speed.paced import Repeated, random_volumes, training_config, training_steps
from benchmarks.speed.paper_cost import estimate
from benchmarks.speed.timing import Benchmark, synchronize
from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.training.config import DiffusionConfig
from diffdiscover3d.training.diffusion import DiffusionTraining

WARMUP = 2
OPERATORS = 25
REST = "loading, noise, moving average, checks"


class Timeline:
    """Whose turn it is: adds the seconds between two marks to the part that was current, and tells the meter.

    Parts inside of which others begin are returned to when those end.
    """

    def __init__(self, device: str, meter: Meter | None = None):
        self.device, self.meter = device, meter
        self.seconds: dict[str, float] = defaultdict(float)
        self.base, self.current, self.counting = REST, REST, False
        self._clock = time.perf_counter()

    def mark(self, part: str) -> None:
        """From now on it is this part's turn."""
        synchronize(self.device)
        now = time.perf_counter()
        if self.counting:
            self.seconds[self.current] += now - self._clock
        self.current, self._clock = part, now
        if self.meter is not None:
            self.meter.part = part if self.counting else "not counted"

    def begin(self, part: str) -> None:
        """As `mark`, for a part of the loop to which the parts of networks return."""
        self.base = part
        self.mark(part)

    def leave(self, part: str) -> None:
        self.mark(self.base)


def unet_parts(unet: UNet3DModel) -> list[tuple[str, torch.nn.Module]]:
    """The rungs of the ladder by name; a level's change of resolution belongs to it."""
    parts = [("entry", unet.time_embedding), ("entry", unet.conv_in)]
    for i, level in enumerate(unet.down_levels, start=1):
        parts.append((f"down level {i}", level))
    for i, down in enumerate(unet.downsamples, start=1):
        parts.append((f"down level {i}", down))
    parts += [("middle", m) for m in (unet.mid_block1, unet.mid_attention, unet.mid_block2)]
    for i, (level, up) in enumerate(zip(unet.up_levels, unet.upsamples, strict=True), start=1):
        parts += [(f"up level {i}", level), (f"up level {i}", up)]
    return [*parts, ("exit", unet.final_block), ("exit", unet.conv_out)]


def run_training(job: dict, steps: int, timeline: Timeline, device: str, on_step: Callable = lambda: None) -> None:
    """The package's training with marks at every border; the steps after the warm-up are counted."""
    with contextlib.ExitStack() as stack:
        taken = 0

        def moments(name: str) -> None:
            nonlocal taken
            if name == "step":
                taken += 1
                timeline.counting = WARMUP <= taken < WARMUP + steps
                on_step()
            timeline.begin({"step": REST, "losses": "losses", "backward": "backward, the rest"}[name])

        def make(config, accelerator):
            task = job["make_task"](config, accelerator)
            forward, backward = job["parts"](task)
            stack.enter_context(watched(forward, timeline.mark, timeline.leave))
            for name, module in backward:
                # the first module of a network has no input that needs a gradient: its hook would come too soon
                module.register_full_backward_pre_hook(lambda m, g, n=name: timeline.mark(f"backward of {n}"))
            return task

        def before_optimizer(*_) -> None:
            timeline.begin("optimiser")

        def after_optimizer(*_) -> None:
            timeline.begin(REST)

        stack.callback(register_optimizer_step_pre_hook(before_optimizer).remove)
        stack.callback(register_optimizer_step_post_hook(after_optimizer).remove)
        config = dataclasses.replace(job["config"], max_steps=WARMUP + steps + 1)
        training_steps(make, config, job["volumes"], {}, WARMUP, device, moments=moments)


def diffusion_job(side: int, seed: int) -> dict:
    """The `small` preset's step, as in diffusion_step.py."""
    config = training_config(DiffusionConfig, 1, preset="small", batch_size=BATCH, sample_size=side, seed=seed)

    def parts(task) -> tuple[list, list]:
        found = unet_parts(task.model)
        return found, found

    return {
        "config": config,
        "volumes": Repeated(random_volumes(BATCH, (side,) * 3, seed)),
        "make_task": lambda config, accelerator: DiffusionTraining(config, (side,) * 3),
        "parts": parts,
    }


def discovery_job(side: int, seed: int) -> dict:
    """The paper's losses on the `small` preset, as in discovery_step.py."""
    config = make_config("the paper's losses, small teacher, fresh", 1, seed)

    def parts(task) -> tuple[list, list]:
        network = task.model.network
        return [("teacher", task.teacher.unet), ("network", network)], [("network", network)]

    return {
        "config": config,
        "volumes": Repeated(random_volumes(config.batch_size, (side,) * 3, seed)),
        "make_task": lambda config, accelerator: make_task(config, accelerator, side, seed),
        "parts": parts,
    }


def training_budget(job: dict, peaks: dict, steps: int, device: str) -> dict:
    """Seconds, operations and bytes of every part of one step, and the operators that take most of it."""
    timeline = Timeline(device)
    run_training(job, steps, timeline, device)
    meter = Meter(peaks)
    with meter:
        run_training(job, 1, Timeline(device, meter), device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    schedule = torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        run_training(job, 1, Timeline(device), device, on_step=profiler.step)
    return budget(timeline, meter, steps) | {"operators": top_operators(profiler)}


def segment_budget(side: int, peaks: dict, rounds: int, device: str) -> dict:
    """The same for `StructureDiscoveryModel.segment` with an embedded model of two levels."""
    model = load_discovery("synthetic-regular", 2).to(device)
    volume = random_volumes(1, (side, side, side // 2), 0)
    networks = [(f"network of level {i}", m.network) for i, m in enumerate(model.levels, start=1)]

    def run(times: int, timeline: Timeline) -> None:
        with watched(networks, timeline.mark, timeline.leave):
            for _ in range(times):
                timeline.begin("before and after the networks")
                model.segment(volume)
            timeline.mark("")

    run(1, Timeline(device))
    timeline, meter = Timeline(device), Meter(peaks)
    timeline.counting = True
    run(rounds, timeline)
    counted = Timeline(device, meter)
    counted.counting = True
    with meter:
        run(1, counted)
    with torch.profiler.profile() as profiler:
        model.segment(volume)
    return budget(timeline, meter, rounds) | {"operators": top_operators(profiler)}


def budget(timeline: Timeline, meter: Meter, times: int) -> dict:
    """Parts in the order in which they first came, each beside its least time; the largest gap by name."""
    parts = []
    for name, seconds in timeline.seconds.items():
        tally = meter.parts[name]
        row = {"part": name, "seconds": seconds / times, "least_seconds": tally.least_seconds}
        row |= {"gflop": sum(tally.flops.values()) / 1e9, "gb": tally.bytes / 1e9, "operators": tally.operators}
        row["fraction_of_roofline"] = tally.least_seconds / row["seconds"]
        parts.append(row)
    gap = max(parts, key=lambda row: row["seconds"] - row["least_seconds"])
    total, least = (sum(row[key] for row in parts) for key in ("seconds", "least_seconds"))
    return {
        "parts": parts,
        "seconds": total,
        "least_seconds": least,
        "fraction_of_roofline": least / total,
        "largest_gap": {"part": gap["part"], "seconds_above_least": gap["seconds"] - gap["least_seconds"]},
    }


def top_operators(profiler: torch.profiler.profile) -> list[dict]:
    """The operators by the time they take themselves."""
    events = [e for e in profiler.key_averages() if not e.key.startswith("ProfilerStep")]
    total = sum(e.self_cpu_time_total for e in events)
    events.sort(key=lambda e: -e.self_cpu_time_total)
    return [
        {"operator": e.key, "ms": e.self_cpu_time_total / 1e3, "share": e.self_cpu_time_total / total, "calls": e.count}
        for e in events[:OPERATORS]
    ]


def main() -> None:
    """Peaks, then the three computations, then the estimate."""
    benchmark = Benchmark("budget", __doc__)
    options = benchmark.parse()
    steps = options.rounds or (1 if options.quick else 5)
    sides = (24, 24, 32) if options.quick else (48, GRID, 160)
    peaks = measure_peaks(options.device, 3 if options.quick else 7, options.quick)
    budgets = {
        f"diffusion step, {sides[0]}^3": training_budget(
            diffusion_job(sides[0], options.seed), peaks, steps, options.device
        ),
        f"discovery step, {sides[1]}^3": training_budget(
            discovery_job(sides[1], options.seed), peaks, steps, options.device
        ),
        f"segment, {sides[2]}x{sides[2]}x{sides[2] // 2}": segment_budget(sides[2], peaks, steps, options.device),
    }
    for name, found in budgets.items():
        print(f"{name}: {found['seconds']:.3f} s, {found['fraction_of_roofline']:.0%} of the roofline")
        for row in found["parts"]:
            print(f"  {row['part']:45s} {row['seconds']:8.4f} s, at least {row['least_seconds']:8.4f} s")
        print(f"  largest gap: {found['largest_gap']}")
    settings = {"steps": steps, "warmup": WARMUP, "batch": BATCH}
    benchmark.write([], settings, peaks=peaks, budgets=budgets, paper_recipe=estimate())


if __name__ == "__main__":
    main()
