"""What a GPU is used for and how well: trainings, features, segmentation, all in one process.

    python -m benchmarks.speed.gpu                           (on a machine with a CUDA GPU; 4 to 8 minutes)
    python -m benchmarks.speed.gpu --device cpu --quick      (tiny sizes, to see that every section runs)

Every row is written as soon as it is measured, so that a run which is stopped keeps what it has. A section that fails
leaves its error in the result, and the next one begins. Times of training steps are those of the package's own loop:
the device is synchronised before the first and after the last counted step, and not in between.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState

from benchmarks.speed.baselines import PlainStep, add_noise, hooked_features, monai_diffusion_unet, upsample
from benchmarks.speed.discovery_step import FIXED, PAPER, make_teacher
from benchmarks.speed.paced import Repeated, random_volumes, training_config
from benchmarks.speed.timing import synchronize
from diffdiscover3d.models.cpu_kernels import Conv3d
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.loop import make_accelerator, train
from diffdiscover3d.utils.provenance import describe_environment

BATCH, WARMUP, STEPS = 4, 7, 12  # a CUDA graph is captured in the fourth step
FEATURE_TIMESTEP = 25


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

    def section(self, name: str, function: Callable, *arguments) -> None:
        """Run a section unless the time is up or others were asked for; an error ends the section only."""
        wanted = self.options.sections
        if (wanted and name not in wanted) or time.perf_counter() - self.started > self.options.budget:
            return
        clock = time.perf_counter()
        try:
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

    def watch_synchronisation(self, enabled: bool) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if enabled else "default")


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


def check_numbers(run: Run, fused: bool) -> None:
    """Loss and gradients in bfloat16, with native or fused kernels, against float32 and its chunked attention."""
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
    found["bfloat16, fused" if fused else "bfloat16"] = gradients(True)
    for name, vector in found.items():
        limit = 1e-4 if name == "float32" else 0.1
        difference = float((vector - expected).norm() / expected.norm())
        run.row(f"loss and gradients, {name}, against float32 in chunks", difference, "relative", limit)


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
    AcceleratorState._reset_state()
    PartialState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, max_steps=10**6, output_dir=str(Path(folder) / "training"))
        accelerator = make_accelerator(config)
        clock = time.perf_counter()
        task = Timed(make_task(config, accelerator), run, profiled)
        with contextlib.suppress(Finished):
            train(task, config, volumes, accelerator)
    found = task.found
    details = {"host_ms": 1e3 * found["host_seconds"], "peak_gib": found["peak_gib"]}
    details["seconds_in_all"] = time.perf_counter() - clock
    run.row(name, 1e3 * found["seconds"], "ms", target, **{k: v and round(v, 2) for k, v in details.items()})
    if profiled:
        run.detail(name, {k: found[k] for k in ("waits", "profile")})
    return found


def diffusion_step(run: Run, preset: str, target: float | None = None, profiled: bool = False, **options) -> None:
    """A training step of a preset's denoiser."""
    side = UNET_PRESETS[preset]["sample_size"]
    if run.quick:
        side, options = 16, {"width": 16, **options}
    if run.device == "cpu":  # where compiling takes minutes and there are no CUDA graphs
        options.pop("compile", None)
    fixed = {"preset": preset, "batch_size": BATCH, "sample_size": side, "mixed_precision": "bf16"}
    config = training_config(DiffusionConfig, 1, **{**fixed, "memory_format": "contiguous", **options})
    volumes = Repeated(random_volumes(BATCH, (side,) * 3, 0))
    shown = ", ".join(f"{k} {v}" for k, v in options.items()) or "eager"

    def make_task(config, accelerator) -> DiffusionTraining:
        return DiffusionTraining(config, (side,) * 3)

    name = f"diffusion step, {preset}, {side}^3, batch {BATCH}, bf16: {shown}"
    time_training(run, name, make_task, config, volumes, target, profiled)


def discovery_step(run: Run, case: dict, name: str, target=None, profiled=False, **options) -> None:
    """A training step of the segmentation network with the small teacher."""
    side = 24 if run.quick else 50
    common = {"preset": "small", "num_parts": 8, "stages": (3,), "batch_size": BATCH, "teacher": "small"}
    fixed = {"mixed_precision": "bf16", "memory_format": "contiguous"}
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

    shown = ", ".join(f"{k} {v}" for k, v in options.items()) or "eager"
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
        pipe = DiffusionFeaturePipeline(unet, make_scheduler(250))
        baseline = UNet3DModel(**unet.config).eval().to(run.device)
        baseline.load_state_dict(unet.state_dict())
        Conv3d.release(baseline)
        for module in baseline.modules():
            if hasattr(module, "forward_chunks"):
                module.forward = module.forward_chunks
        volume = torch.rand(1, 1, side, side, side, device=run.device)
        noise = torch.randn(1, *volume.shape, device=run.device)
        for stage in (1, 2, 3):

            def own(bf16: bool, pipe=pipe, volume=volume, noise=noise, stage=stage):
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
            ways = {"float32": functools.partial(own, False), "bf16": functools.partial(own, True)}
            graph = 1e3 * median_seconds(run, graphed(run, ways["bf16"]), rounds)
            for name, way in ways.items():
                ours = 1e3 * median_seconds(run, way, rounds)
                distance = float((way().float() - expected).norm() / expected.norm())
                more = {"ours_ms": ours, "hooks_ms": theirs, "hooks_on_voxels_ms": on_voxels, "difference": distance}
                if name == "bf16":
                    more["graph_ms"] = graph
                more = {k: float(f"{v:.4g}") for k, v in more.items()}
                run.row(
                    f"features, stage {stage}, {preset}, {name}", theirs / ours, "times", 3.0, at_least=True, **more
                )


def graphed(run: Run, way: Callable) -> Callable:
    """A call captured as a CUDA graph: what it would take without the host."""
    if run.device != "cuda":
        return way
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        way()
    return graph.replay


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

    AcceleratorState._reset_state()
    PartialState._reset_state()
    volumes = load_volumes("synthetic-regular")
    grid = tuple(volumes[0]["volume"].shape[1:])
    curve: list[tuple[int, float, float]] = []

    class Learning(Timed):
        def losses(self, model, batch):
            losses = self._task.losses(model, batch)
            self._last = losses["loss"].detach()
            return losses

        def after_step(self, step: int) -> dict[str, float]:
            shown = self._task.after_step(step)
            now = time.perf_counter() - self._clock
            if step % (1 if run.quick else 50) == 0:
                curve.append((step, now))
            if now > seconds:
                raise Finished
            return shown

    with tempfile.TemporaryDirectory() as folder:
        quick = {"width": 16, "sample_size": 16} if run.quick else {}
        fixed = {"preset": preset, "mixed_precision": "bf16", "memory_format": "contiguous"}
        quiet = {"output_dir": str(Path(folder) / "training"), "log_every": 1 if run.quick else 50}
        config = training_config(DiffusionConfig, 50_000, **{**fixed, **quiet, **quick, **options})
        accelerator = make_accelerator(config)
        task = Learning(DiffusionTraining(config, grid), run, False)
        task._clock = time.perf_counter()
        with contextlib.suppress(Finished):
            train(task, config, volumes, accelerator)
        log = Path(folder) / "training" / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
    run.detail(f"training {preset}", {"log": [json.loads(line) for line in lines], "seconds": curve})
    steps, last = curve[-1]
    run.row(f"training, {preset}: steps in {last:.0f} s", steps, "steps", volumes=len(volumes), grid=list(grid))


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
        import os

        os.environ["ACCELERATE_USE_CPU"] = "true"
    run = Run(options)
    graphs = {"cuda_graphs": True}
    run.section("ceilings", measure_ceilings)
    run.section("paper", diffusion_step, "paper", 60.0, True)
    run.section("small", diffusion_step, "small", 12.0, True)
    run.section("paper graphs", lambda r: diffusion_step(r, "paper", 60.0, **graphs))
    run.section("small graphs", lambda r: diffusion_step(r, "small", 12.0, **graphs))
    paper, fixed = PAPER, {**PAPER, **FIXED}
    run.section("discovery", discovery_step, paper, "the paper's losses, fresh teacher", 25.0, True)
    run.section("discovery graphs", lambda r: discovery_step(r, paper, "the paper's losses, fresh", 25.0, **graphs))
    run.section("discovery fixed", lambda r: discovery_step(r, fixed, "the paper's losses, fixed", 25.0, **graphs))
    run.section("numbers", check_numbers, False)
    run.section("features", features)
    run.section("segment", segment)
    run.section("small compiled", lambda r: diffusion_step(r, "small", 12.0, compile=True, **graphs))
    run.section("paper compiled", lambda r: diffusion_step(r, "paper", 45.0, True, compile=True))
    run.section("paper compiled graphs", lambda r: diffusion_step(r, "paper", 45.0, compile=True, **graphs))
    run.section("numbers, fused", check_numbers, True)
    last = {"compile": True, "memory_format": "channels_last"}
    run.section("paper channels-last", lambda r: diffusion_step(r, "paper", 45.0, **graphs, **last))
    run.section("baselines", baselines)
    if options.train_seconds:
        run.section("learning", lambda r: learning(r, "paper", options.train_seconds, **graphs))
    run.write()
    print(json.dumps({"errors": list(run.result["errors"]), "seconds": run.result["seconds"]}))


if __name__ == "__main__":
    main()
