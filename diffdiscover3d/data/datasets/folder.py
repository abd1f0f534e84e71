"""A folder, glob or text list of volumes as a dataset."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d.data.datasets.listing import describe_left_out, look_into
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import volume_sha256
from diffdiscover3d.data.working_grid import WorkingGrid, spacing_on
from diffdiscover3d.errors import InputError

if TYPE_CHECKING:
    pass

_CACHE_BYTES = 4 * 2**30  # maximum size of the volumes of a dataset kept in memory


class VolumeFolder:
    """Sequence of volumes in canonical orientation, min-max normalised.

    Items are `{"volume": (1, H, W, D) float32 in [0, 1], "name": str, "spacing_mm": (x, y, z)}`, with 1 mm where a file
    gives no voxel size. Volumes are kept in memory after the first access, up to 4 GiB in total.

    Attributes:
        paths: paths of the files, sorted.
        shapes: shapes of the volumes; `None` until set by [`read_all`].
        left_out: a line for each reason for which files were not taken as scans.
        notes: of the volumes read so far, by index: what was unusual, and what rules the intensity range.

    Args:
        source, include, series: see [`list_volumes`].
        working_grid: to which volumes are resampled, with their intensities in [0, 1] afterwards.
        reading: see [`read_volume`].

    Raises:
        InputError: on construction, if there are no volumes; on access, if a volume cannot be read, or its file has
            changed since it was first read.
    """

    def __init__(
        self,
        source: str | Path,
        include: Sequence[str] = (),
        series: str | None = None,
        working_grid: WorkingGrid | None = None,
        **reading,
    ):
        contents = look_into(source, include, series)
        self.paths, self.left_out = list(contents.volumes), describe_left_out(contents)
        self.reading = reading if series is None else {**reading, "series": series}
        self.working_grid = working_grid
        self.shapes: list[tuple[int, ...]] | None = None
        self.notes: dict[int, list[str]] = {}
        self._cache: dict[int, dict] = {}
        self._cached_bytes = 0
        self._sha256: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """The sha256 over names and contents of the volumes, which does not depend on the path of the folder."""
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            if index not in self._sha256:
                self._sha256[index] = volume_sha256(path)
            digest.update(f"{path.name}\0{self._sha256[index]}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _check_unchanged(self, index: int, sha256: str) -> None:
        if self._sha256.setdefault(index, sha256) != sha256:
            raise InputError(
                f"{self.paths[index]}: has changed since the training began; start a new training, or restore it."
            )

    def __getitem__(self, index: int) -> dict:
        import torch  # lazy, because listing files does not need torch

        from diffdiscover3d.data.intensity_range import describe_volume_range
        from diffdiscover3d.data.transforms import min_max_normalize, resize_volume

        if index in self._cache:
            return dict(self._cache[index])
        scan = read_volume(self.paths[index], **self.reading)
        self._check_unchanged(index, scan.sha256)
        self.notes[index] = [*scan.notes, *describe_volume_range(scan.data)]
        volume, spacing = torch.from_numpy(scan.data)[None], scan.spacing_mm
        if self.working_grid is not None:
            if self.working_grid.leaves_as_it_is(scan.unit):
                raise InputError(
                    f"{self.paths[index]}: gives no voxel size; use --spacing-unit voxel for multiples of its voxels."
                )
            grid = self.working_grid.of(scan.shape, scan.spacing_mm, scan.unit, self.paths[index])
            spacing = spacing_on(grid, scan.shape, spacing)
            volume = resize_volume(volume[None], grid)[0]
        volume = min_max_normalize(volume)
        item = {"volume": volume, "name": self.paths[index].name, "spacing_mm": spacing}
        if self._cached_bytes + volume.nbytes <= _CACHE_BYTES:
            self._cache[index] = item
            self._cached_bytes += volume.nbytes
        return dict(item)
