"""Choose the fastest precision and memory format of a device by measurement."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import nn

from diffdiscover3d.models.blocks import ResidualBlock
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.training.checkpoints import STATE_FILE
from diffdiscover3d.training.config import MEMORY_FORMATS, DiffusionConfig, TrainingConfig
from diffdiscover3d.utils.files import read_json

logger = logging.getLogger("diffdiscover3d")
FORMATS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
FORMATS["auto"] = FORMATS["channels_last"]  # for tasks created without measuring
_GAIN = 1.15  # minimum worthwhile speed-up of bfloat16
_ROUNDS = 3


def settle_precision(config: TrainingConfig, written: Path) -> TrainingConfig:
    """The config with "auto" replaced in `mixed_precision` and `memory_format`; the same on all processes.

    A resumed training keeps its earlier choice. A precision given to the launcher (`accelerate launch
    --mixed_precision`) takes precedence over a measurement, which the main process makes. If bf16 was set by either and
    is slower than float32 on a CPU without instructions for it, a warning contains the measured factor.

    Args:
        written: file with the options of the training in the output folder, if there is one.
    """
    wanted = [name for name in ("mixed_precision", "memory_format") if getattr(config, name) == "auto"]
    if not wanted and config.mixed_precision != "bf16":
        return config
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    asked_for = _launched_precision() if config.mixed_precision == "auto" else config.mixed_precision
    if wanted:
        chosen = [_settle(config, written, wanted, state.device) if state.is_main_process else None]
        if state.num_processes > 1:  # only the main process has the result
            broadcast_object_list(chosen)
        config = dataclasses.replace(config, **{name: chosen[0][name] for name in wanted})
    if asked_for == config.mixed_precision == "bf16" and state.is_main_process:
        _warn_if_slow(state.device, _probe(config))
    return config


def _settle(config: TrainingConfig, written: Path, wanted: list[str], device: torch.device) -> dict[str, str]:
    chosen = {}
    if config.resume:
        chosen = _options_in(written if config.resume == "latest" else Path(config.resume) / STATE_FILE)
    launched = _launched_precision()
    if launched in ("bf16", "fp16"):
        chosen.setdefault("mixed_precision", launched)
    if any(name not in chosen for name in wanted):
        found = choose(measure(device, _probe(config)))
        logger.info("fastest on this device: %s", ", ".join(f"{k} {v}" for k, v in found.items()))
        chosen = {**found, **chosen}
    if config.use_8bit_adam:  # bitsandbytes makes weights contiguous
        chosen["memory_format"] = "contiguous"
    return chosen


def _probe(config: TrainingConfig) -> str:
    return "unet" if isinstance(config, DiffusionConfig) else "discovery"


def _launched_precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def has_bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU is known to multiply bfloat16 numbers in hardware; `False` where there is no such file."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & words)  # the last is of Arm


def _warn_if_slow(device: torch.device, probe: str) -> None:
    """Warn if bfloat16 is slower than float32 on a CPU without instructions for it, with the measured factor."""
    if device.type != "cpu" or has_bf16_instructions():
        return
    seconds = measure(device, probe)
    factor = min(s for way, s in seconds.items() if way[0] == "bf16") / min(
        s for way, s in seconds.items() if way[0] == "no"
    )
    if factor > 1:
        logger.warning(
            "bf16 takes %.1f times as long as float32 on this CPU; --mixed-precision no or auto is faster",
            factor,
        )


@functools.lru_cache(maxsize=8)
def measure(device: torch.device, probe: str = "unet") -> dict[tuple[str, str], float]:
    """Seconds of a forward and backward pass of a small network, for each (mixed_precision, memory_format).

    On a CPU the time of a single thread is measured, so that other programs do not affect the choice.

    Args:
        probe: "unet" for residual blocks of the diffusion model, "discovery" for a segmentation network.
    """
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)
    # on a GPU, launch overhead would dominate the time of volumes as small as a CPU's
    width, edge = (16, 24) if on_cpu else (64, 64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, channels = _PROBES[probe](width)
            volume = torch.randn(2, channels, edge, edge, edge)
        return _measure(
            network.to(device).train(), volume.to(device), time.thread_time if on_cpu else time.perf_counter
        )
    finally:
        torch.set_num_threads(threads)


def _residual_blocks(width: int) -> tuple[nn.Module, int]:
    return nn.Sequential(ResidualBlock(width, width, None, 8), ResidualBlock(width, 2 * width, None, 8)), width


def _segmentation_network(_width: int) -> tuple[nn.Module, int]:
    return StructureDiscoveryModel(2, dropout=0.0, norm="instance").network, 1


_PROBES: dict[str, Callable] = {"unet": _residual_blocks, "discovery": _segmentation_network}


def _measure(network: nn.Module, volume: torch.Tensor, now: Callable[[], float]) -> dict[tuple[str, str], float]:
    device = volume.device
    ways = list(itertools.product(("no", "bf16"), MEMORY_FORMATS[1:]))
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    with measured_convolutions(device):
        for _ in range(1 + _ROUNDS):  # interleaved, so that other load affects all alike
            for precision, layout in ways:
                network.zero_grad()
                network.to(memory_format=FORMATS[layout])
                x = volume.contiguous(memory_format=FORMATS[layout])
                _wait_for(device)
                clock = now()
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = network(x).float().square().mean()
                loss.backward()
                _wait_for(device)
                seconds[precision, layout].append(now() - clock)
    # the first pass also prepares; a coarse clock may see no time at all
    return {way: max(min(times[1:]), 1e-9) for way, times in seconds.items()}


def choose(seconds: dict[tuple[str, str], float]) -> dict[str, str]:
    """The fastest options of [`measure`]; float32 if bfloat16 gains little."""
    best = {
        precision: min(MEMORY_FORMATS[1:], key=lambda f, p=precision: seconds[p, f]) for precision in ("no", "bf16")
    }
    gain = seconds["no", best["no"]] / seconds["bf16", best["bf16"]]
    precision = "bf16" if gain >= _GAIN else "no"
    return {"mixed_precision": precision, "memory_format": best[precision]}


@contextlib.contextmanager
def measured_convolutions(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Let cuDNN measure its kernels for each shape and use the fastest, in place of its heuristics.

    The heuristics choose slow kernels for some 3D convolutions of the UNets.

    Args:
        enabled: `False` changes nothing, for inputs of many shapes.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or (enabled and device.type == "cuda")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _options_in(file: Path) -> dict:
    """The options saved by a training; unreadable files are reported where options are compared."""
    try:
        options = read_json(file)
        options = options["config"] if file.name == STATE_FILE else options
        return {k: options[k] for k in ("mixed_precision", "memory_format") if options.get(k) not in (None, "auto")}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
