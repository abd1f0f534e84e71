"""What a GPU is used for and how well: trainings, features, segmentation, all in one process.

    python -m benchmarks.speed.gpu                           (on a machine with a CUDA GPU; 4 to 8 minutes)
    python -m benchmarks.speed.gpu --device cpu --quick      (tiny sizes, to see that every section runs)

Every row is written as soon as it is measured, so that a run which is stopped keeps what it has. A section that fails
leaves its error in the result, and the next one begins. Times of training steps are those of the package's own loop:
the device is synchronised before the first and after the last counted step, and not in between.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.speed.baselines import PlainStep, add_noise, hooked_features, monai_diffusion_unet, upsample
from benchmarks.speed.discovery_step import FIXED, PAPER, make_teacher
from benchmarks.speed.gpu_run import Finished, Run, Timed, exact_float32, median_seconds, time_training
from benchmarks.speed.paced import Repeated, random_volumes, training_config
from benchmarks.speed.timing import synchronize
from diffdiscover3d.models.cpu_kernels import Conv3d
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train

BATCH = 4
FEATURE_TIMESTEP = 25


def measure_ceilings(run: Run) -> None:
    """Rates of a large copy and of large matrix products."""
    n, count = (512, 2**20) if run.quick else (8192, 2**30)
    source = torch.randn(count, device=run.device)
    target = torch.empty_like(source)
    seconds = median_seconds(run, lambda: target.copy_(source), 5)
    run.row("copy", 2 * source.nbytes / seconds / 1e12, "TB/s")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))
        seconds = median_seconds(run, lambda a=a, b=b: a @ b, 5)
        run.row(f"matrix product {str(dtype)[6:]}", 2 * n**3 / seconds / 1e12, "TFLOP/s")


def check_numbers(run: Run, fused: bool) -> None:
    """Loss and gradients in bfloat16, with native, Triton or compiled kernels, against float32 in chunks."""
    torch.manual_seed(0)
    side = 16 if run.quick else 32
    options = {**UNET_PRESETS["paper"], "width": 32, "sample_size": side}
    unet = UNet3DModel(**options).to(run.device)
    x = torch.randn(2, 1, side, side, side, device=run.device)
    steps = torch.tensor([3, 200], device=run.device)
    kind = torch.device(run.device).type

    def gradients(bf16: bool) -> torch.Tensor:
        unet.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            prediction = unet(x, steps).sample.float()
        F.l1_loss(prediction, x).backward()
        return torch.cat([prediction.detach().flatten(), *(p.grad.flatten() for p in unet.parameters())])

    attentions = [m for m in unet.modules() if hasattr(m, "forward_chunks")]
    tokens = [m.forward for m in attentions]
    for m in attentions:
        m.forward = m.forward_chunks
    with exact_float32():
        expected = gradients(False)
        for m, forward in zip(attentions, tokens, strict=True):
            m.forward = forward
        found = {"float32": gradients(False)}
    if fused and kind == "cuda":
        unet.fuse_kernels()
    found["bfloat16, compiled" if fused else "bfloat16"] = gradients(True)
    if not fused:
        unet.to(memory_format=torch.channels_last_3d)
        found["bfloat16, channels-last"] = gradients(True)
    for name, vector in found.items():
        limit = 1e-4 if name == "float32" else 0.1
        difference = float((vector - expected).norm() / expected.norm())
        run.row(f"loss and gradients, {name}, against float32 in chunks", difference, "relative", limit)


def diffusion_step(run: Run, preset: str, target: float | None = None, profiled: bool = False, **options) -> None:
    """A training step of a preset's denoiser."""
    side = UNET_PRESETS[preset]["sample_size"]
    if run.quick:
        side, options = 16, {"width": 16, **options}
    if run.device == "cpu":  # where compiling takes minutes and there are no CUDA graphs
        options.pop("compile", None)
    fixed = {"preset": preset, "batch_size": BATCH, "sample_size": side, "mixed_precision": "bf16"}
    config = training_config(DiffusionConfig, 1, **{**fixed, "memory_format": "channels_last", **options})
    volumes = Repeated(random_volumes(BATCH, (side,) * 3, 0))
    shown = ", ".join(f"{k} {v}" for k, v in options.items()) or "as by default"

    def make_task(config, accelerator) -> DiffusionTraining:
        return DiffusionTraining(config, (side,) * 3)

    name = f"diffusion step, {preset}, {side}^3, batch {BATCH}, bf16: {shown}"
    time_training(run, name, make_task, config, volumes, target, profiled)


def discovery_step(run: Run, case: dict, name: str, target=None, profiled=False, **options) -> None:
    """A training step of the segmentation network with the small teacher."""
    side = 24 if run.quick else 50
    common = {"preset": "small", "num_parts": 8, "stages": (3,), "batch_size": BATCH, "teacher": "small"}
    fixed = {"mixed_precision": "bf16", "memory_format": "channels_last"}
    config = training_config(DiscoveryConfig, 1, **{**common, **case, **fixed, **options})
    volumes = Repeated(random_volumes(BATCH, (side,) * 3, 0))

    def make_task(config, accelerator) -> DiscoveryTraining:
        task = DiscoveryTraining(config, make_teacher("small", 0), volumes, [volumes[0]], accelerator)
        if task.teacher_signals.fixed:  # as after the first epoch
            known = {"index": torch.arange(BATCH), "flips": torch.zeros(BATCH, 3, dtype=torch.bool)}
            with accelerator.autocast():
                task.teacher_signals({"volume": volumes.volumes.to(accelerator.device), **known})
            kept = task.teacher_signals._cache
            kept.update({index: kept[index % BATCH] for index in range(len(volumes))})
        return task

    shown = ", ".join(f"{k} {v}" for k, v in options.items()) or "as by default"
    time_training(run, f"discovery step, {name}, {side}^3, bf16: {shown}", make_task, config, volumes, target, profiled)


def baselines(run: Run) -> None:
    """Plain steps: MONAI's network of the same widths, and the direct form of ours in float32."""
    for preset in ("small", "paper"):
        side = 16 if run.quick else UNET_PRESETS[preset]["sample_size"]
        options = {**UNET_PRESETS[preset], "sample_size": side} | ({"width": 16} if run.quick else {})
        plain = {**options, "attention": (None,) * 4}
        ways = {"MONAI, bf16": (monai_diffusion_unet(UNet3DModel(**plain)), True)}
        if preset == "small":  # linear attention on each level as the authors have it
            direct = UNet3DModel(**{**options, "attention": ("linear",) * 4})
            for module in direct.modules():
                if hasattr(module, "forward_chunks"):
                    module.forward = module.forward_chunks
            ways |= {"MONAI, float32": (ways["MONAI, bf16"][0], False), "direct, float32": (direct, False)}
        for name, (model, bf16) in ways.items():
            clean = 2 * random_volumes(BATCH, (side,) * 3, 0).to(run.device) - 1
            noisy, timestep = clean + 0.3 * torch.randn_like(clean), torch.randint(250, (BATCH,), device=run.device)
            model = model.to(run.device)

            def loss(model=model, noisy=noisy, timestep=timestep, clean=clean) -> torch.Tensor:
                output = model(noisy, timestep)
                return F.l1_loss((output if isinstance(output, torch.Tensor) else output.sample).float(), clean)

            step = PlainStep(model, loss, bf16, torch.device(run.device).type)
            run.reset_peak()
            seconds = median_seconds(run, step, 2 if run.quick else 7)
            what = f"plain diffusion step, {preset} widths, {side}^3, batch {BATCH}: {name}"
            run.row(what, 1e3 * seconds, "ms", peak_gib=run.peak_gib())
            del step, model
            gc.collect()


@torch.no_grad()
def features(run: Run) -> None:
    """Features of each decoder stage against forward hooks on the whole network in float32."""
    for preset in ("small", "paper"):
        side = 16 if run.quick else UNET_PRESETS[preset]["sample_size"]
        torch.manual_seed(0)
        unet = UNet3DModel(**{**UNET_PRESETS[preset], "sample_size": side}).eval().to(run.device)
        unet.to(memory_format=torch.channels_last_3d)
        pipe = DiffusionFeaturePipeline(unet, make_scheduler(250))
        graphed = DiffusionFeaturePipeline(unet, make_scheduler(250))
        graphed.enable_cuda_graphs()
        baseline = UNet3DModel(**unet.config).eval().to(run.device)
        baseline.load_state_dict(unet.state_dict())
        Conv3d.release(baseline)
        for module in baseline.modules():
            if hasattr(module, "forward_chunks"):
                module.forward = module.forward_chunks
        volume = torch.rand(1, 1, side, side, side, device=run.device)
        noise = torch.randn(1, *volume.shape, device=run.device)
        for stage in (1, 2, 3):

            def own(bf16: bool, pipe, volume=volume, noise=noise, stage=stage):
                with torch.autocast(volume.device.type, torch.bfloat16, enabled=bf16):
                    return pipe.extract(volume, noise, FEATURE_TIMESTEP, (stage,)).features[0]

            def hooked(pipe=pipe, baseline=baseline, volume=volume, noise=noise, stage=stage):
                noisy, steps = add_noise(pipe.scheduler, baseline, volume, noise[0], FEATURE_TIMESTEP)
                return hooked_features(baseline, noisy, steps, (stage,))[0][0]

            def direct(hooked=hooked, side=side):
                return upsample(hooked(), (side,) * 3)

            expected = hooked()
            rounds = 2 if run.quick else 15
            theirs, on_voxels = (1e3 * median_seconds(run, way, rounds) for way in (hooked, direct))
            ways = {
                "float32": functools.partial(own, False, pipe),
                "bf16": functools.partial(own, True, pipe),
                "bf16, CUDA graphs": functools.partial(own, True, graphed),
            }
            for name, way in ways.items():
                ours = 1e3 * median_seconds(run, way, rounds)
                distance = float((way().float() - expected).norm() / expected.norm())
                more = {"ours_ms": ours, "hooks_ms": theirs, "hooks_on_voxels_ms": on_voxels, "difference": distance}
                more = {k: float(f"{v:.4g}") for k, v in more.items()}
                run.row(
                    f"features, stage {stage}, {preset}, {name}", theirs / ours, "times", 3.0, at_least=True, **more
                )


@torch.no_grad()
def segment(run: Run) -> None:
    """The segmentation network on a scan, in float32 and with autocast: time, memory, equal labels."""
    shape = (48, 40, 32) if run.quick else (240, 240, 155)
    torch.manual_seed(0)
    folder = Path(__file__).resolve().parents[2] / "diffdiscover3d" / "assets" / "synthetic-regular"
    found = sorted(folder.rglob("level-2/config.json")) or sorted(folder.rglob("config.json"))
    candidates = [f.parent for f in found if "StructureDiscovery" in f.read_text()]
    model = StructureDiscoveryModel.from_pretrained(str(candidates[-1])).to(run.device)
    scan = random_volumes(1, shape, 0)[0, 0]
    labels = {}
    for precision in ("float32", "bf16"):
        kind = torch.device(run.device).type
        seconds = []
        for _ in range(2 if run.quick else 4):
            synchronize(run.device)
            run.reset_peak()
            clock = time.perf_counter()
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                labels[precision] = model.segment(scan).labels.cpu()
            seconds.append(time.perf_counter() - clock)
        what = f"segment {'x'.join(map(str, shape))} in memory, {candidates[-1].name}, {precision}"
        run.row(what, float(np.median(seconds[1:])), "s", first=round(seconds[0], 3), peak_gib=run.peak_gib())
    equal = float((labels["float32"] == labels["bf16"]).float().mean())
    run.row("labels in bf16 equal to float32's", 100 * equal, "%", 99.9, at_least=True)


def learning(run: Run, preset: str, seconds: float, **options) -> None:
    """Train the denoiser on synthetic volumes for some time: a curve of losses, and steps per second."""
    from diffdiscover3d.data.loading import load_volumes

    volumes = load_volumes("synthetic-regular")
    grid = tuple(volumes[0]["volume"].shape[1:])
    curve: list[tuple[int, float]] = []

    class Learning(Timed):
        def after_step(self, step: int) -> dict[str, float]:
            shown = self._task.after_step(step)
            now = time.perf_counter() - self._clock
            if step % (1 if run.quick else 50) == 0:
                curve.append((step, now))
                keep()  # a run that is stopped keeps what it has
            if now > seconds and len(curve) > 1:  # with what the first step has logged
                raise Finished
            return shown

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "training" / "log.jsonl"

        def keep() -> None:
            lines = log.read_text().splitlines() if log.exists() else []
            run.detail(f"training {preset}", {"log": [json.loads(line) for line in lines], "seconds": curve})

        quick = {"width": 16, "sample_size": 16} if run.quick else {}
        fixed = {"preset": preset, "mixed_precision": "bf16", "memory_format": "channels_last"}
        quiet = {"output_dir": str(Path(folder) / "training"), "log_every": 1 if run.quick else 50}
        config = training_config(DiffusionConfig, 50_000, **{**fixed, **quiet, **quick, **options})
        accelerator = make_accelerator(config)
        task = Learning(DiffusionTraining(config, grid), run, False)
        task._clock = time.perf_counter()
        with contextlib.suppress(Finished):
            train(task, config, volumes, accelerator)
        keep()
    steps, last = curve[-1]
    run.row(f"training, {preset}: steps in {last:.0f} s", steps, "steps", volumes=len(volumes), grid=list(grid))


def cuda_tests(run: Run) -> None:
    """The tests for a GPU, in a process of their own, in what is left of the budget."""
    if run.device != "cuda":
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda"]
    environment = {**os.environ, "DIFFDISCOVER3D_TEST_CUDA": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=max(1.0, run.left()), check=False
    )
    run.detail("tests", {"exit_code": done.returncode, "end": done.stdout[-3000:]})


def main() -> None:
    """Run the sections, the most telling first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no section begins")
    parser.add_argument("--train-seconds", type=float, default=0, help="also train the paper preset for so long")
    parser.add_argument("--sections", nargs="+", help="run only these")
    parser.add_argument("--output", default="benchmarks/results/gpu.json", help="the JSON file")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    run = Run(options)
    eager = {"cuda_graphs": False}
    run.section("ceilings", measure_ceilings)
    run.section("paper", diffusion_step, "paper", 60.0)
    run.section("small", diffusion_step, "small", 12.0)
    run.section("paper eager", lambda r: diffusion_step(r, "paper", None, True, **eager))
    run.section("small eager", lambda r: diffusion_step(r, "small", None, True, **eager))
    run.section("paper contiguous", lambda r: diffusion_step(r, "paper", None, memory_format="contiguous"))
    paper, fixed = PAPER, {**PAPER, **FIXED}
    run.section("discovery", discovery_step, paper, "the paper's losses, fresh teacher", 25.0)
    run.section("discovery fixed", discovery_step, fixed, "the paper's losses, fixed teacher", 25.0)
    run.section("discovery eager", lambda r: discovery_step(r, paper, "the paper's losses, fresh", None, True, **eager))
    run.section("numbers", check_numbers, False)
    run.section("features", features)
    run.section("segment", segment)
    # a section that hangs must not cost the others
    compiled = {"compile": True}
    run.section("paper compiled", lambda r: diffusion_step(r, "paper", 45.0, True, **compiled), limit=90)
    run.section("small compiled", lambda r: diffusion_step(r, "small", 12.0, **compiled), limit=90)
    run.section("numbers, compiled", check_numbers, True, limit=180)
    run.section("baselines", baselines)
    run.section("tests", cuda_tests)
    if options.train_seconds:
        run.section("learning", lambda r: learning(r, "paper", options.train_seconds))
    run.write()
    print(json.dumps({"errors": list(run.result["errors"]), "seconds": run.result["seconds"]}))


if __name__ == "__main__":
    main()
