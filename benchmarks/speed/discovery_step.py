"""One step of stage 2 against the direct formulation: 8 parts, features of stage 3, batches of 4, 50^3.

    python -m benchmarks.speed.discovery_step

Direct: float32 throughout, the whole teacher with forward hooks, all channels on the voxels, Eq. 5 as written, two
passes of the segmentation network. The package's step is the one `train` takes, with loading, noise and checks, in the
precision and memory layout that `train` chooses by a measurement, once for each case. Before anything is timed, both
give the same losses for the same batch in float32.

Cases: the three losses of the paper (Eq. 4), and the `small` preset as it is, whose consistencies are relative and
which also asks the teacher for its clean prediction. The teacher is the `small` UNet, or the paper's (width 64, 64^3,
attention on every level). "Fresh": the teacher is asked at every step, as the direct formulation does. "Fixed": it was
asked once for each volume (`--teacher-noise fixed`, as in the recipe `small`). Steps after the first epoch are timed,
and the asking is added to them, spread over the paper's 100 epochs; what it took is in the details. The direct
formulation asks at every step, as the authors' code does.
"""

import functools
from pathlib import Path

import torch

from benchmarks.speed.baselines import PlainStep, direct_discovery_losses
from benchmarks.speed.meter import count_flops
from benchmarks.speed.paced import Repeated, random_volumes, training_config, training_steps
from benchmarks.speed.timing import Benchmark, compare, compare_memory, peak_above, seconds_of, summarize
from diffdiscover3d.models.cpu_kernels import Conv3d
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.config import DiscoveryConfig
from diffdiscover3d.training.data_order import draw_generator
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.precision import settle_precision

COMMON = {"preset": "small", "num_parts": 8, "stages": (3,), "batch_size": 4}
PAPER, FIXED = {"relative_consistency": False, "lambda_denoised": 0.0}, {"teacher_noise": "fixed"}
# name: (teacher, options, target, rounds)
CASES = {
    "the paper's losses, small teacher, fresh": ("small", PAPER, 5.0, 11),
    "the paper's losses, small teacher, fixed": ("small", {**PAPER, **FIXED}, 5.0, 11),
    "the small preset, fresh": ("small", {}, None, 7),
    "the small preset, fixed, no dropout": ("small", {**FIXED, "dropout": 0.0}, None, 7),
    "the paper's losses, the paper's teacher, fresh": ("paper", PAPER, 5.0, 3),
    "the paper's losses, the paper's teacher, fixed": ("paper", {**PAPER, **FIXED}, 5.0, 3),
}
GRID = 50
EPOCHS = 100  # of the paper, over which asking once is spread
WARMUP = 2
TOLERANCE = {"fresh": 1e-4, "fixed": 2e-3}  # relative; what is kept is kept in half precision
DIRECT = "the direct formulation"
SHOWN = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}


def make_teacher(preset: str, seed: int) -> DiffusionFeaturePipeline:
    """An untrained network of a preset."""
    torch.manual_seed(seed)
    return DiffusionFeaturePipeline(UNet3DModel(**UNET_PRESETS[preset]).eval(), make_scheduler(250))


def make_task(config: DiscoveryConfig, accelerator, side: int, seed: int) -> DiscoveryTraining:
    """The package's training on random volumes."""
    volumes = Repeated(random_volumes(config.batch_size, (side,) * 3, seed))
    return DiscoveryTraining(config, make_teacher(config.teacher, seed), volumes, [volumes[0]], accelerator)


def make_config(case: str, steps: int, seed: int, **options) -> DiscoveryConfig:
    teacher, changed, *_ = CASES[case]
    options = {**COMMON, **changed, **options}
    return training_config(DiscoveryConfig, steps, teacher=teacher, seed=seed, **options)


def choose_precision(case: str, seed: int) -> dict[str, str]:
    """Precision and memory layout as `train` would choose them."""
    config = settle_precision(make_config(case, 1, seed, output_dir="unused"), Path("unused"))
    return {"mixed_precision": config.mixed_precision, "memory_format": config.memory_format}


def ask_for_all(task: DiscoveryTraining, volumes: Repeated) -> float:
    """What the first epoch of a fixed teacher does: it is asked for every volume. Returns the seconds a volume took."""
    device, count = task.accelerator.device, len(volumes.volumes)
    known = {"index": torch.arange(count), "flips": torch.zeros(count, 3, dtype=torch.bool)}
    with task.accelerator.autocast():
        seconds = seconds_of(lambda: task.teacher_signals({"volume": volumes.volumes.to(device), **known}), device.type)
    kept = task.teacher_signals._cache  # the same few volumes over and over: so are the answers
    kept.update({index: kept[index % count] for index in range(len(volumes))})
    return seconds / count


def draw_batch(task: DiscoveryTraining, side: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """A batch as a training with a fresh teacher would draw it, from the task's own `draw`."""
    volumes = random_volumes(task.config.batch_size, (side,) * 3, seed)
    task.device = torch.device("cpu")  # where the noise is drawn
    drawn = [task.draw(v, draw_generator(seed, 0, slot)) for slot, v in enumerate(volumes)]
    batch = {name: torch.stack([d[name] for d in drawn]) for name in drawn[0]}
    known = {"index": torch.arange(len(volumes)), "flips": torch.zeros(len(volumes), 3, dtype=torch.bool)}
    return {name: x.to(device) for name, x in {"volume": volumes, **known, **batch}.items()}


def direct_step(task: DiscoveryTraining, batch: dict, seed: int, device: str) -> PlainStep:
    """The direct formulation as a training step, with a network and teacher of its own in float32, contiguous."""
    config, teacher = task.config, make_teacher(task.config.teacher, seed).to(device)
    Conv3d.release(teacher.unet).requires_grad_(False)
    torch.manual_seed(seed)
    network = StructureDiscoveryModel(config.num_parts, dropout=config.dropout, norm=config.norm).to(device)

    def loss() -> torch.Tensor:
        return direct_discovery_losses(teacher.unet, teacher.scheduler, network, batch, config)["loss"]

    return PlainStep(network, loss)


def both_losses(case: str, side: int, seed: int, device: str) -> dict[str, dict[str, float]]:
    """The losses of both ways for one batch in float32, dropout off, the same noise."""
    config = make_config(case, 1, seed, mixed_precision="no", dropout=0.0, output_dir="unused")
    task = make_task(config, make_accelerator(config), side, seed)
    batch = fresh_batch(case, side, seed, device)
    if task.teacher_signals.fixed:
        grid = task.teacher.unet.noise_grid or (side,) * 3
        batch["noise"] = torch.stack([task.teacher_signals.fixed_noise(i, grid) for i in batch["index"].tolist()]).to(
            device
        )
    package = task.losses(task.model.train(), task.prepare(batch))
    direct = direct_discovery_losses(
        make_teacher(config.teacher, seed).to(device).unet, task.teacher.scheduler, task.model, batch, config
    )
    return {name: {k: v.item() for k, v in x.items()} for name, x in (("package", package), ("direct", direct))}


def fresh_batch(case: str, side: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """A batch with noise for the direct formulation, whichever way the package's teacher is asked."""
    config = make_config(case, 1, seed, teacher_noise="fresh", output_dir="unused")
    return draw_batch(make_task(config, make_accelerator(config), side, seed), side, seed, device)


def measure(
    case: str, side: int, rounds: int, seed: int, device: str, baselines: bool, chosen: dict[str, str]
) -> tuple[dict, dict]:
    """Seconds of the package's steps, and of the baseline's if wanted; and what else was found."""
    config = make_config(case, WARMUP + rounds + 1, seed, **chosen)
    volumes, found = Repeated(random_volumes(config.batch_size, (side,) * 3, seed)), {}

    def make(config: DiscoveryConfig, accelerator) -> DiscoveryTraining:
        task = make_task(config, accelerator, side, seed)
        if task.teacher_signals.fixed:
            found["seconds_to_ask_for_a_volume"] = ask_for_all(task, volumes)
        if baselines:
            steps[DIRECT] = direct_step(task, fresh_batch(case, side, seed, device), seed, device)
            found["flops"] = count_flops(steps[DIRECT])
        return task

    steps: dict[str, PlainStep] = {DIRECT: lambda: None} if baselines else {}
    return training_steps(make, config, volumes, steps, WARMUP, device), found


def measure_memory(case: str, way: str, side: int, seed: int, device: str, chosen: dict[str, str]) -> dict:
    """Peak memory of a few steps of one way, of its networks and optimiser as well."""

    def run_direct() -> None:
        config = make_config(case, 1, seed, output_dir="unused")
        task = make_task(config, make_accelerator(config), side, seed)
        step = direct_step(task, fresh_batch(case, side, seed, device), seed, device)
        for _ in range(WARMUP + 2):
            step()

    run_package = functools.partial(measure, case, side, 1, seed, device, baselines=False, chosen=chosen)
    return {"peak_above_inputs_mib": peak_above(run_direct if way == DIRECT else run_package, device)}


def main() -> None:
    """Compare the losses, then time both ways in turns, then measure the memory of each."""
    benchmark = Benchmark("discovery-step", __doc__)
    options = benchmark.parse()
    side = 24 if options.quick else GRID
    if options.worker:
        kind, case, *more = options.worker
        if kind == "losses":
            return benchmark.answer(both_losses(case, side, options.seed, options.device))
        way, *chosen = more
        chosen = dict(zip(("mixed_precision", "memory_format"), chosen, strict=True))
        return benchmark.answer(measure_memory(case, way, side, options.seed, options.device, chosen))
    rows, details = [], {}
    for case, (teacher, changed, target, usual) in CASES.items():
        kind = changed.get("teacher_noise", "fresh")
        rounds = 2 if options.quick else min(options.rounds or usual, usual)
        losses = benchmark.worker("losses", case)
        for name, value in losses["direct"].items():
            if abs(losses["package"][name] - value) > TOLERANCE[kind] * abs(value):
                raise SystemExit(f"{case}: the losses differ: {losses}.")
        chosen = choose_precision(case, options.seed)
        seconds, found = measure(case, side, rounds, options.seed, options.device, baselines=True, chosen=chosen)
        asking = found.get("seconds_to_ask_for_a_volume", 0.0) * COMMON["batch_size"] / EPOCHS
        seconds["package"] = [s + asking for s in seconds["package"]]
        memory = {}
        if teacher == "small":  # the paper's holds more in its weights than either way needs beside them
            memory = {
                way: benchmark.worker("memory", case, way, *chosen.values())["peak_above_inputs_mib"]
                for way in ("package", DIRECT)
            }
        what = f"discovery step, {case}, {side}^3, {SHOWN[chosen['mixed_precision']]}"
        rows.append(compare(what, DIRECT, seconds[DIRECT], seconds["package"], target))
        if memory:
            rows.append(compare_memory(what, DIRECT, memory[DIRECT], memory["package"]))
        details[case] = {
            "package": summarize(seconds["package"]),
            "direct": summarize(seconds[DIRECT], found.pop("flops")),
            "losses_in_float32": losses,
            "peak_above_inputs_mib": memory,
            "rounds": rounds,
            **chosen,
            **found,
        }
    settings = {**COMMON, "grid": side, "warmup": WARMUP, "tolerance": TOLERANCE, "epochs": EPOCHS}
    benchmark.write(rows, settings, **details)


if __name__ == "__main__":
    main()
