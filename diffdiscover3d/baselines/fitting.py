"""Training of baseline networks: checkpointed, resumable and deterministic."""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from diffdiscover3d.errors import ModelError
from diffdiscover3d.training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)

_STEP_STRIDE = 1_000_003  # a prime: seeds of different trainings and steps do not coincide in practice


@dataclass(frozen=True)
class Schedule:
    """How a baseline network is optimised (Adam).

    Attributes:
        steps: optimiser steps.
        learning_rate: initial rate.
        decay: "constant", "cosine" (to zero), or "poly" (to zero, power 0.9).
        weight_decay: L2 penalty of Adam.
        amsgrad: the AMSGrad variant of Adam.
        clip: largest norm of the gradient; `None`: no clipping.
        bf16: compute the loss under bfloat16 autocast.
    """

    steps: int
    learning_rate: float
    decay: str = "constant"
    weight_decay: float = 0.0
    amsgrad: bool = False
    clip: float | None = None
    bf16: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        done = step / self.steps
        factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "poly": (1 - done) ** 0.9}
        return self.learning_rate * factor[self.decay]


def train_network(
    network: nn.Module,
    loss: Callable[[int], torch.Tensor],
    schedule: Schedule,
    folder: Path | None,
    seed: int,
    settings: dict | None = None,
    checkpoint_seconds: float = 60.0,
) -> float:
    """Minimise a loss; with a folder, continue from the newest checkpoint in it.

    The global random state is seeded before every step by `seed` and the step's number and restored afterwards, so a
    resumed training takes the same steps as one that was never stopped.

    Args:
        network: whatever is trained, buffers included; its parameters that require gradients are optimised.
        loss: called with the number of the step, counted from 0; a scalar. It draws from the global generator.
        schedule: number of steps and the optimiser's options.
        folder: for the checkpoints; `None` keeps nothing.
        seed: of the random draws.
        settings: JSON values that a checkpoint must have been written with.
        checkpoint_seconds: time between two checkpoints. The last step is always saved.

    Returns:
        Seconds that the training took, in this run and in those it continues.

    Raises:
        ModelError: if the loss is not finite, or the folder's checkpoint was made with other settings or is damaged.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        parameters, schedule.learning_rate, weight_decay=schedule.weight_decay, amsgrad=schedule.amsgrad
    )
    identity = {"schedule": asdict(schedule), "seed": seed, "settings": settings or {}}
    start, seconds = _resume(network, optimizer, folder, identity)
    device = parameters[0].device.type
    network.train()
    saved = time.monotonic()
    begun = saved - seconds
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.random.fork_rng():
            torch.manual_seed(seed * _STEP_STRIDE + step)
            with torch.autocast(device, torch.bfloat16) if schedule.bf16 else nullcontext():
                value = loss(step)
            if not torch.isfinite(value):
                raise ModelError(f"the loss of step {step + 1} is {value.item()}; try a lower learning rate.")
            optimizer.zero_grad()
            value.backward()
        if schedule.clip is not None:
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        seconds = time.monotonic() - begun
        if folder is not None and (step + 1 == schedule.steps or time.monotonic() - saved >= checkpoint_seconds):
            _save(network, optimizer, folder, step + 1, {"identity": identity, "seconds": seconds})
            saved = time.monotonic()
    network.eval()
    return seconds


def _resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None, identity: dict
) -> tuple[int, float]:
    """Load the newest checkpoint, if there is one; return its step and the seconds spent until then."""
    checkpoints = list_checkpoints(folder) if folder is not None else []
    if not checkpoints:
        return 0, 0.0
    tensors, state = load_checkpoint(checkpoints[-1])
    if state.get("identity") != identity:
        raise ModelError(
            f"{checkpoints[-1]}: made with other settings ({state.get('identity')}); remove {folder} to train again."
        )
    own, stored = _tensors(network), tensors["model"]
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
        raise ModelError(f"{checkpoints[-1]}: does not fit the network; remove {folder} to train again.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])
    unpack_optimizer(optimizer, tensors["optimizer"])
    return state["step"], float(state["seconds"])


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once: some networks of MONAI have two names for a layer."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _save(network: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int, state: dict) -> None:
    older = list_checkpoints(folder)
    tensors = {"model": _tensors(network), "optimizer": pack_optimizer(optimizer)}
    save_checkpoint(folder, step, tensors, state)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
