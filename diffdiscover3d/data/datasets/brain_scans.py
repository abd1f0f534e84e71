"""Brain-extracted scans in their frames, and brain phantoms beside them, for the training of `brain-flair`."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from diffdiscover3d.data.datasets.brain_phantom import PHANTOM_VERSION, brain_phantom
from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.foreground import Frame, find_foreground, robust_scale
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import volume_sha256
from diffdiscover3d.errors import InputError

logger = logging.getLogger("diffdiscover3d")


class BrainScans(Sequence):
    """Scans of a folder, and phantoms without lesions, robustly scaled in the frames around their foregrounds.

    Items are `{"volume": (1, *frame) float32, "foreground": (1, *frame) bool, "name": str}`. All are kept in memory.

    Args:
        source: as for [`list_volumes`]; files named `*_lesion.*`, `*_seg.*` or `*_mask.*` are masks and left out.
        frame: the grid of the frames.
        phantoms: how many phantoms follow the scans.
        include, series: as for [`list_volumes`].
        reading: see [`read_volume`].

    Raises:
        InputError: if there is no scan, or one cannot be used.
    """

    def __init__(
        self,
        source: str | Path,
        frame: Sequence[int],
        phantoms: int = 0,
        include: Sequence[str] = (),
        series: str | None = None,
        **reading,
    ):
        self.paths = [p for p in list_volumes(source, include, series) if not _is_mask(p)]
        self.reading = reading if series is None else {**reading, "series": series}
        self.frame, self.phantoms = tuple(frame), phantoms
        self.shapes = [self.frame] * len(self)
        self._kept: dict[int, dict] = {}
        self._sha256: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths) + self.phantoms

    def fingerprint(self) -> str:
        """What the volumes are, in a line."""
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            digest.update(f"{path.name}\0{self._sha256_of(index)}\0".encode(errors="surrogateescape"))
        return f"brain scans {digest.hexdigest()} frame {self.frame} phantoms {self.phantoms} version {PHANTOM_VERSION}"

    def _sha256_of(self, index: int) -> str:
        if index not in self._sha256:
            self._sha256[index] = volume_sha256(self.paths[index])
        return self._sha256[index]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._kept:
            if index < len(self.paths):
                scan = read_volume(self.paths[index], **self.reading)
                if self._sha256.setdefault(index, scan.sha256) != scan.sha256:
                    raise InputError(f"{self.paths[index]}: has changed since the training began; restore it.")
                name, data = self.paths[index].name, scan.data
            else:
                number = index - len(self.paths)
                name, data = f"brain-phantom-train-{number:03d}", brain_phantom("train", number).healthy
            self._kept[index] = {**frame_scan(torch.from_numpy(data), self.frame), "name": name}
        return self._kept[index]


def frame_scan(volume: torch.Tensor, grid: Sequence[int]) -> dict[str, torch.Tensor]:
    """An (H, W, D) scan as an item of [`BrainScans`], without a name."""
    volume = volume[None, None].float()
    foreground = find_foreground(volume)
    frame = Frame.around(foreground, grid)
    inside = frame.crop(foreground.float()) > 0.5
    return {"volume": (frame.crop(robust_scale(volume, foreground)) * inside)[0], "foreground": inside[0]}


def _is_mask(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".nii").endswith(("_lesion", "_seg", "_mask"))
