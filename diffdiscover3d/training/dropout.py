"""Dropout whose masks are functions of (seed, step, slot, layer, pass): the same on one process or on eight."""

import itertools

import numpy as np
import torch
from torch import nn


class SlotDropout(nn.Dropout):
    """`nn.Dropout` that draws the mask of each volume of a batch from that volume's own generator.

    Args:
        p: probability of a zero.
        layer: number of the layer, so that layers differ.

    Without slots (see [`set_slots`]), and in evaluation, it is plain `nn.Dropout`.
    """

    def __init__(self, p: float, layer: int):
        super().__init__(p)
        self.layer = layer
        self.draws = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.draws is None or self.p == 0:
            return super().forward(x)
        seed, step, slots, passes = self.draws
        current = next(passes)
        drawn = torch.empty_like(x, dtype=torch.float32)
        if len(x) % len(slots):
            raise ValueError(f"a batch of {len(x)} cannot hold the volumes of {len(slots)} slots.")
        for place, one in enumerate(drawn):  # several versions of the volumes may share a batch, one after the other
            version, index = divmod(place, len(slots))
            key = np.random.SeedSequence([seed, step, slots[index], self.layer, current, version, 0xD209])
            generator = torch.Generator(x.device).manual_seed(int(key.generate_state(1, np.uint64)[0]) >> 1)
            one.uniform_(generator=generator)  # several times faster than bernoulli_ on a CPU
        return x * (drawn >= self.p) / (1 - self.p)


def use_slot_dropout(model: nn.Module) -> list[SlotDropout]:
    """Put [`SlotDropout`] in the place of every `nn.Dropout`; weights and their names stay."""
    replaced = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                replaced.append(SlotDropout(child.p, layer=len(replaced)))
                setattr(parent, name, replaced[-1].train(child.training))
            elif isinstance(child, SlotDropout):  # a network that has been trained before
                replaced.append(child)
    return replaced


def set_slots(layers: list[SlotDropout], seed: int, step: int, slots: list[int]) -> None:
    """Say which volumes the next passes see: slots are places in the global batch of the step."""
    for layer in layers:
        layer.draws = (seed, step, slots, itertools.count())


def sees_its_own_batch_only(model: nn.Module) -> bool:
    """Whether the model normalises over the volumes a process sees at a time, as batch norm does."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
