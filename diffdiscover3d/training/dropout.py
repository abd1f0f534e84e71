"""Dropout masks as functions of (seed, step, slot, layer, pass), equal on any number of processes."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

# multipliers of the 32-bit finalizer of MurmurHash3, and the golden ratio of Knuth's multiplicative hashing
_MULTIPLIERS, _GOLDEN = (0x85EBCA6B, 0xC2B2AE35), 0x9E3779B1


class SlotDropout(nn.Dropout):
    """`nn.Dropout` whose mask of each volume of a batch depends only on that volume's place in the global batch.

    On a CPU each mask is drawn from a generator of its own. On other devices all masks of a batch are computed by a
    hash of the voxels' positions, without work on the host for each volume; see [`hashed_masks`].

    Args:
        p: probability of a zero.
        layer: number of the layer, so that layers differ.

    Without slots (see [`set_slots`]), and in evaluation mode, it is plain `nn.Dropout`.
    """

    def __init__(self, p: float, layer: int):
        super().__init__(p)
        self.layer = layer
        self.draws: _Draws | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.draws is None or self.p == 0:
            return super().forward(x)
        slots, current = self.draws.slots, next(self.draws.passes[self.layer])
        if len(x) % len(slots):
            raise ValueError(f"a batch of {len(x)} cannot hold the volumes of {len(slots)} slots.")
        if x.device.type != "cpu":
            versions = len(x) // len(slots)
            kept = hashed_masks(self.draws.keys_on(x.device), versions, x[0].numel(), self.p, self.layer, current)
            return torch.ops.aten.native_dropout_backward(x, kept.view(x.shape), 1 / (1 - self.p))
        drawn = torch.empty_like(x, dtype=torch.float32)
        for place, one in enumerate(drawn):  # several versions of the volumes may share a batch, one after the other
            version, index = divmod(place, len(slots))
            key = np.random.SeedSequence(
                [self.draws.seed, self.draws.step, slots[index], self.layer, current, version, 0xD209]
            )
            generator = torch.Generator(x.device).manual_seed(int(key.generate_state(1, np.uint64)[0]) >> 1)
            one.uniform_(generator=generator)  # several times faster than bernoulli_ on a CPU
        return x * (drawn >= self.p) / (1 - self.p)


class _Draws:
    """The values that all layers need for a step: its seed, number and slots, and how many passes each layer made."""

    def __init__(self, seed: int, step: int, slots: list[int], layers: Sequence[SlotDropout]):
        self.seed, self.step, self.slots = seed, step, slots
        self.layers = [layer.layer for layer in layers]
        self.keys: torch.Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """Count the passes of each layer from 0."""
        self.passes = {layer: itertools.count() for layer in self.layers}

    def keys_on(self, device: torch.device) -> torch.Tensor:
        """(slots, 2) int32 keys, computed once a step."""
        if self.keys is None:
            self.keys = slot_keys(self.seed, self.step, self.slots).to(device)
        return self.keys

    def reuse_keys_of(self, previous: "_Draws | None") -> None:
        """Write the keys into the tensor of the step before, since a CUDA graph reads them at a fixed address."""
        if previous is not None and previous.keys is not None and len(previous.slots) == len(self.slots):
            self.keys = previous.keys.copy_(slot_keys(self.seed, self.step, self.slots), non_blocking=True)


def slot_keys(seed: int, step: int, slots: Sequence[int]) -> torch.Tensor:
    """(slots, 2) int32, two words of a hash of (seed, step, slot) for each slot."""
    words = [np.random.SeedSequence([seed, step, slot, 0xD209]).generate_state(2, np.uint32) for slot in slots]
    return torch.from_numpy(np.stack(words).view(np.int32))


def hashed_masks(
    keys: torch.Tensor, versions: int, size: int, p: float, layer: int = 0, current: int = 0
) -> torch.Tensor:
    """Dropout masks by hashing the position of each element with the key of its volume.

    Args:
        keys: (slots, 2) int32 of [`slot_keys`].
        versions: how many times the slots' volumes are in the batch, one after the other.
        size: elements of one volume.
        p: probability of `False`.
        layer, current: number of the layer and of the pass through it in this step.

    Returns:
        (versions * slots, size) bool.
    """
    salt = _salts(versions, layer, current, keys.device)
    first, second = ((keys[None, :, i] ^ salt[:, None, i]).reshape(-1, 1) for i in range(2))
    hashed = _hashed_positions(size, keys.device)[None] ^ first
    hashed.mul_(_signed(_MULTIPLIERS[0])).add_(second)
    hashed ^= hashed >> 15
    hashed.mul_(_signed(_MULTIPLIERS[1]))
    hashed ^= hashed >> 13
    hashed.mul_(_signed(_GOLDEN))
    return hashed >= int(p * 2**32) - 2**31


@functools.lru_cache(maxsize=64)
def _hashed_positions(size: int, device: torch.device) -> torch.Tensor:
    """(size,) int32: neighbouring positions are far from each other."""
    with torch.inference_mode(False):
        position = torch.arange(size, dtype=torch.int32, device=device).mul_(_signed(_GOLDEN))
        position ^= position >> 16
        return position.mul_(_signed(_MULTIPLIERS[0]))


@functools.lru_cache(maxsize=1024)
def _salts(versions: int, layer: int, current: int, device: torch.device) -> torch.Tensor:
    """(versions, 2) int32 by which the keys of a layer, pass and version differ from those of others."""
    words = [np.random.SeedSequence([layer, current, v, 0x5A17]).generate_state(2, np.uint32) for v in range(versions)]
    with torch.inference_mode(False):
        return torch.from_numpy(np.stack(words).view(np.int32)).to(device)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def use_slot_dropout(model: nn.Module) -> list[SlotDropout]:
    """Replace every `nn.Dropout` by a [`SlotDropout`]; weights and their names stay."""
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
    """Set the volumes of the next forward passes, by their places in the global batch of a step."""
    draws = _Draws(seed, step, slots, layers)
    if layers:
        draws.reuse_keys_of(layers[0].draws)
    for layer in layers:
        layer.draws = draws


def repeat_masks(layers: list[SlotDropout]) -> None:
    """Let the next forward pass draw the masks that the first one since [`set_slots`] drew."""
    for layer in layers:
        if layer.draws is not None:
            layer.draws.begin()


def sees_its_own_batch_only(model: nn.Module) -> bool:
    """Whether the model normalises over the volumes of one process at a time, as batch norm does."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
