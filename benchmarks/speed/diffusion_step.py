"""One step of stage 1 against the same network done the direct way, and against MONAI's diffusion UNet.

    python -m benchmarks.speed.diffusion_step

The package's step is the one of its `small` preset as `train` takes it, with loading, noise, clipping, Adam, checks and
the moving average. The baselines take the same volumes, and only forward, L1, backward, clipping and Adam.

- direct: the same network in float32, contiguous, with the authors' attention: linear on each level, full in the
  middle. Full attention on each level cannot be held at 48^3 (4 heads of 110,592^2 weights at the finest level), so a
  pair of rows at 24^3 has it, where torch's fused kernel can.
- MONAI: `DiffusionModelUNet` of the same widths and depth, as its users run it (float32), and in bfloat16 and
  channels-last for a comparison on equal terms.

Peak memory is of one process for each way. MONAI's network needs einops, which the package does not:
pip install einops.
"""

import importlib.util

import torch
import torch.nn.functional as F

from benchmarks.speed.baselines import PlainStep, monai_diffusion_unet
from benchmarks.speed.meter import count_flops
from benchmarks.speed.paced import Repeated, random_volumes, training_config, training_steps
from benchmarks.speed.timing import Benchmark, compare, compare_memory, peak_above, summarize
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.training.config import DiffusionConfig
from diffdiscover3d.training.diffusion import DiffusionTraining

BATCH = 4
BASELINES = ("direct", "MONAI float32", "MONAI bf16 channels-last")
WARMUP = 2


def package_unet(grid: int, attention: str | None = None) -> UNet3DModel:
    """The network of the `small` preset, with this attention on every level."""
    options = {**UNET_PRESETS["small"], "sample_size": grid}
    return UNet3DModel(**(options if attention is None else options | {"attention": (attention,) * 4}))


def baseline_step(name: str, grid: int, device: str, seed: int) -> PlainStep:
    """A baseline's training step on volumes and noise of its own, of the same sizes as the package's."""
    torch.manual_seed(seed)
    if name.startswith("direct"):
        model = package_unet(grid, "full" if name.endswith("full attention") else "linear")
    else:
        model = monai_diffusion_unet(package_unet(grid))
    bf16 = "bf16" in name
    model = model.to(device, memory_format=torch.channels_last_3d if bf16 else torch.contiguous_format)
    clean = 2 * random_volumes(BATCH, (grid,) * 3, seed).to(device) - 1
    noisy, timestep = clean + 0.3 * torch.randn_like(clean), torch.randint(250, (BATCH,), device=device)

    def loss() -> torch.Tensor:
        output = model(noisy, timestep)
        return F.l1_loss((output if isinstance(output, torch.Tensor) else output.sample).float(), clean)

    return PlainStep(model, loss, bf16, torch.device(device).type)


def package_steps(grid: int, rounds: int, seed: int, baselines: dict, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of the package's steps and of the baselines'."""
    config = training_config(
        DiffusionConfig,
        WARMUP + rounds + 1,
        preset="small",
        batch_size=BATCH,
        seed=seed,
        sample_size=grid,
    )
    volumes = Repeated(random_volumes(BATCH, (grid,) * 3, seed))

    def make_task(config, accelerator):
        return DiffusionTraining(config, (grid,) * 3)

    return training_steps(make_task, config, volumes, baselines, WARMUP, device)


def measure_memory(name: str, grid: int, device: str, seed: int) -> dict:
    """Peak memory of three steps of one way above what the process held before them."""
    if name == "package":
        peak = peak_above(lambda: package_steps(grid, 1, seed, {}, device), device)
    else:
        step = baseline_step(name, grid, device, seed)
        peak = peak_above(lambda: [step() for _ in range(3)], device)
    return {"peak_above_inputs_mib": peak}


def main() -> None:
    """Time all ways in turns, then measure the memory of each."""
    benchmark = Benchmark("diffusion-step", __doc__)
    options = benchmark.parse()
    if options.worker:
        name, grid = options.worker
        return benchmark.answer(measure_memory(name, int(grid), options.device, options.seed))
    if importlib.util.find_spec("einops") is None:
        raise SystemExit("MONAI's diffusion UNet needs einops: pip install einops.")
    grid, small_grid = (24, 8) if options.quick else (48, 24)
    rounds = options.rounds or (3 if options.quick else 15)
    rows, details = [], {}
    full = "direct, full attention"
    # tens of seconds a step: fewer rounds
    for side, names, times in ((grid, BASELINES, rounds), (small_grid, (full,), max(2, rounds // 3))):
        baselines = {name: baseline_step(name, side, options.device, options.seed) for name in names}
        flops = {name: count_flops(step) for name, step in baselines.items()}
        seconds = package_steps(side, times, options.seed, baselines, options.device)
        details[f"{side}^3"] = {name: summarize(s, flops.get(name)) for name, s in seconds.items()}
        for name in names:
            target = 1.0 if name.startswith("MONAI") else 3.0 if name == "direct" else None
            what = f"diffusion step, {side}^3, batch {BATCH}"
            rows.append(compare(what, name, seconds[name], seconds["package"], target))
        memory = {name: benchmark.worker(name, side)["peak_above_inputs_mib"] for name in ("package", *names)}
        details[f"{side}^3 memory"] = memory
        rows += [compare_memory(rows[-1]["what"], name, memory[name], memory["package"]) for name in names]
    settings = {"preset": "small", "batch": BATCH, "grids": [grid, small_grid], "warmup": WARMUP}
    benchmark.write(rows, settings, **details)


if __name__ == "__main__":
    main()
