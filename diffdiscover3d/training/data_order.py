"""Which volumes a step sees, and with which noise: functions of (seed, step, slot) and of nothing else.

A slot is a place in the global batch. Neither the number of processes nor an interruption can change a training:
each process takes its own slots of the same batch, and a resumed one asks for the steps that are left.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from diffdiscover3d.data.transforms import draw_flips, flip, resize_volume


def draw_generator(seed: int, step: int, slot: int) -> torch.Generator:
    """The CPU generator of everything random about one volume of one step."""
    state = np.random.SeedSequence([seed, step, slot]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def volume_index(seed: int, position: int, length: int) -> int:
    """The volume at a position of the endless stream of epochs, each a permutation of all volumes."""
    epoch, place = divmod(position, length)
    return int(_permutation(seed, epoch, length)[place])


_last_permutation: tuple = (None, None)


def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    global _last_permutation
    key = (seed, epoch, length)
    if _last_permutation[0] != key:
        # the constant keeps the order of volumes apart from the draws of `draw_generator`
        _last_permutation = (key, np.random.default_rng([seed, epoch, length, 0x0DE2]).permutation(length))
    return _last_permutation[1]


class StepBatches:
    """Batch sampler: the (index, step, slot) of this process's share of every micro-batch from `start` to `stop`."""

    def __init__(self, length, batch_size, accumulation, rank, world_size, seed, start, stop):
        if batch_size % (accumulation * world_size):
            raise ValueError(
                f"`batch_size` ({batch_size}) is shared by {world_size} processes and {accumulation} accumulation "
                f"steps; give --batch-size a multiple of {accumulation * world_size}."
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
    """Volumes in [0, 1] with index, slot, how they were mirrored, and what a training step draws at random for them.

    Args:
        volumes: a sequence whose items hold a (1, H, W, D) float32 tensor under "volume".
        draw: called with the volume and its generator, returns further tensors for the batch (noise, timestep, ...).
        seed, flips: as in the training's config.
        grid: resample every volume to it first; `None` leaves them as they are.
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
