"""Deterministic data order and noise of a training, as functions of (seed, step, slot) only.

A slot is a position in the global batch. The number of processes and interruptions do not affect a training: each
process loads its own slots of the same global batch, and a resumed training continues with the remaining steps.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from diffdiscover3d.data.transforms import draw_flips, flip, resize_volume


def draw_generator(seed: int, step: int, slot: int) -> torch.Generator:
    """The CPU generator of all random draws for one volume of one step."""
    state = np.random.SeedSequence([seed, step, slot]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def draw_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Standard normal noise drawn on a device, each entry by a generator of its own seed.

    Args:
        seeds: one for each volume.
        shape: of one volume's noise.

    Returns:
        (len(seeds), *shape) float32.
    """
    noise, generator = torch.empty(len(seeds), *shape, device=device), torch.Generator(device)
    for one, seed in zip(noise, seeds, strict=True):
        one.normal_(generator=generator.manual_seed(seed))
    return noise


def draw_noise_seed(generator: torch.Generator) -> torch.Tensor:
    """A seed for [`draw_noise`], an int64 scalar."""
    return torch.randint(2**62, (), generator=generator)


def volume_index(seed: int, position: int, length: int) -> int:
    """The index of the volume at a position in the concatenation of all epochs, each a permutation of the volumes."""
    epoch, place = divmod(position, length)
    return int(_permutation(seed, epoch, length)[place])


_last_permutation: tuple = (None, None)


def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    global _last_permutation
    key = (seed, epoch, length)
    if _last_permutation[0] != key:
        # the constant decorrelates the order of volumes from `draw_generator`
        _last_permutation = (key, np.random.default_rng([seed, epoch, length, 0x0DE2]).permutation(length))
    return _last_permutation[1]


class StepBatches:
    """Batch sampler that yields the (index, step, slot) of this process in each micro-batch from `start` to `stop`."""

    def __init__(self, length, batch_size, accumulation, rank, world_size, seed, start, stop):
        if batch_size % (accumulation * world_size):
            raise ValueError(
                f"`batch_size` ({batch_size}) is split among {world_size} processes and {accumulation} accumulation "
                f"steps; set --batch-size to a multiple of {accumulation * world_size}."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        share = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.start, self.stop):
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * share
                yield [
                    (volume_index(self.seed, step * self.batch_size + slot, self.length), step, slot)
                    for slot in range(first, first + share)
                ]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation


class TrainingVolumes(Dataset):
    """Dataset of volumes in [0, 1] with their index, slot, flips and random draws.

    Args:
        volumes: a sequence of dicts with a (1, H, W, D) float32 tensor under "volume".
        draw: function of the volume and its generator that returns further tensors for the batch (noise, timestep,
            ...).
        seed, flips: as in [`TrainingConfig`].
        grid: grid to which every volume is resampled; `None` disables resampling.
    """

    def __init__(self, volumes, draw: Callable[[torch.Tensor, torch.Generator], dict], seed: int, flips: bool, grid):
        self.volumes, self.draw, self.seed, self.flips, self.grid = volumes, draw, seed, flips, grid

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        index, step, slot = key
        generator = draw_generator(self.seed, step, slot)
        volume = self.volumes[index]["volume"]
        if self.grid is not None:
            volume = resize_volume(volume[None], self.grid)[0]
        flips = draw_flips(generator) if self.flips else torch.zeros(3, dtype=torch.bool)
        volume = flip(volume, flips).contiguous()
        known = {"index": torch.tensor(index), "slot": torch.tensor(slot), "flips": flips}
        return {"volume": volume, **known, **self.draw(volume, generator)}
