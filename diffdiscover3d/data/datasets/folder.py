"""A folder, glob or text list of volumes as a dataset."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d.data.datasets.listing import describe_left_out, look_into
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import volume_sha256
from diffdiscover3d.errors import InputError

if TYPE_CHECKING:
    import torch

_CACHE_BYTES = 4 * 2**30  # maximum size of the volumes of a dataset kept in memory


class VolumeFolder:
    """Sequence of volumes in canonical orientation, min-max normalised.

    Items are `{"volume": (1, H, W, D) float32 in [0, 1], "name": str, "spacing_mm": (x, y, z)}`. Volumes are kept in
    memory after the first access, up to 4 GiB in total.

    Attributes:
        paths: paths of the files, sorted.
        shapes: shapes of the volumes; `None` until set by [`read_all`].
        left_out: a line for each reason for which files were not taken as scans.
        notes: of the volumes read so far, by index: what was unusual, and what rules the intensity range.

    Args:
        source, include, series: see [`list_volumes`].
        reading: see [`read_volume`].

    Raises:
        InputError: on construction, if there are no volumes; on access, if a volume cannot be read, or its file has
            changed since it was first read.
    """

    def __init__(self, source: str | Path, include: Sequence[str] = (), series: str | None = None, **reading):
        contents = look_into(source, include, series)
        self.paths, self.left_out = list(contents.volumes), describe_left_out(contents)
        self.reading = reading if series is None else {**reading, "series": series}
        self.shapes: list[tuple[int, ...]] | None = None
        self.notes: dict[int, list[str]] = {}
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0
        self._sha256: dict[int, str] = {}
        self._spacing_mm: dict[int, tuple[float, float, float]] = {}

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
        from diffdiscover3d.data.transforms import min_max_normalize

        volume = self._cache.get(index)
        if volume is None:
            scan = read_volume(self.paths[index], **self.reading)
            self._check_unchanged(index, scan.sha256)
            self._spacing_mm[index] = tuple(scan.spacing_mm)
            self.notes[index] = [*scan.notes, *describe_volume_range(scan.data)]
            volume = min_max_normalize(torch.from_numpy(scan.data)[None])
            if self._cached_bytes + volume.nbytes <= _CACHE_BYTES:
                self._cache[index] = volume
                self._cached_bytes += volume.nbytes
        return {"volume": volume, "name": self.paths[index].name, "spacing_mm": self._spacing_mm[index]}
