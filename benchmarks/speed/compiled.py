"""What `--compile` gains: steps of both trainings with and without it, each in the package's own loop.

    python -m benchmarks.speed.compiled

The two take turns, training by training; compiling falls into steps that are not counted, and what it takes is in the
details (the second time torch finds most of it in its cache). The quartiles pair steps by their number, though they are
of different trainings. A graph break in the diffusion model's forward pass ends it: there are to be none.
"""

import time

import torch

from benchmarks.speed.discovery_step import GRID, make_config, make_task
from benchmarks.speed.paced import Repeated, random_volumes, training_config, training_steps
from benchmarks.speed.timing import Benchmark, compare, summarize
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.training.config import DiffusionConfig
from diffdiscover3d.training.diffusion import DiffusionTraining

BATCH = 4
WARMUP = 3
TURNS = 2
CASE = "the paper's losses, small teacher, fresh"


def diffusion_steps(compiled: bool, side: int, rounds: int, seed: int, device: str) -> list[float]:
    """Seconds of steps of stage 1."""
    options = {"preset": "small", "batch_size": BATCH, "sample_size": side, "compile": compiled, "seed": seed}
    config = training_config(DiffusionConfig, WARMUP + rounds + 1, **options)
    volumes = Repeated(random_volumes(BATCH, (side,) * 3, seed))

    def make(config, accelerator) -> DiffusionTraining:
        return DiffusionTraining(config, (side,) * 3)

    return training_steps(make, config, volumes, {}, WARMUP, device)["package"]


def discovery_steps(compiled: bool, side: int, rounds: int, seed: int, device: str) -> list[float]:
    """Seconds of steps of stage 2."""
    config = make_config(CASE, WARMUP + rounds + 1, seed, compile=compiled)
    volumes = Repeated(random_volumes(config.batch_size, (side,) * 3, seed))

    def make(config, accelerator):
        return make_task(config, accelerator, side, seed)

    return training_steps(make, config, volumes, {}, WARMUP, device)["package"]


STAGES = {"diffusion step": (diffusion_steps, 48), "discovery step": (discovery_steps, GRID)}


def count_graph_breaks(device: str) -> int:
    """Graph breaks in the forward pass of the `small` UNet, of a training step."""
    torch._dynamo.reset()
    unet = UNet3DModel(**{**UNET_PRESETS["small"], "sample_size": 16}).to(device)
    x, steps = torch.randn(2, 1, 16, 16, 16, device=device), torch.tensor([3, 7], device=device)
    return torch._dynamo.explain(unet)(x, steps).graph_break_count


def main() -> None:
    """Both stages, with and without, in turns."""
    benchmark = Benchmark("compiled", __doc__)
    options = benchmark.parse()
    rounds = options.rounds or (2 if options.quick else 8)
    breaks = count_graph_breaks(options.device)
    if breaks:
        raise SystemExit(f"the UNet has {breaks} graph breaks.")
    rows, details = [], {"graph_breaks_of_the_unet": breaks}
    for stage, (steps, side) in STAGES.items():
        side = 16 if options.quick else side
        seconds, totals = {"plain": [], "compiled": []}, {"plain": [], "compiled": []}
        for _ in range(TURNS):
            for way in seconds:
                torch._dynamo.reset()
                clock = time.perf_counter()
                seconds[way] += steps(way == "compiled", side, rounds, options.seed, options.device)
                totals[way].append(time.perf_counter() - clock)
        rows.append(compare(f"{stage}, {side}^3, --compile", "not compiled", seconds["plain"], seconds["compiled"]))
        details[stage] = {way: summarize(s) | {"seconds_in_all": totals[way]} for way, s in seconds.items()}
    benchmark.write(rows, {"rounds": rounds, "turns": TURNS, "warmup": WARMUP, "batch": BATCH}, **details)


if __name__ == "__main__":
    main()
