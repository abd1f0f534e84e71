"""A folder, glob or text list of volumes as a dataset."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import files_of, split

if TYPE_CHECKING:
    import torch

_CACHE_BYTES = 4 * 2**30  # maximum size of the volumes of a dataset kept in memory
_END_BYTES = 4096


def files_fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """The sha256 over names, sizes, and the first and last 4 KiB of files, in the given order."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_END_BYTES)
            file.seek(max(0, size - _END_BYTES))
            ends = head + file.read(_END_BYTES)
        digest.update(f"{name}\0{size}\0".encode() + hashlib.sha256(ends).digest())
    return digest.hexdigest()


class VolumeFolder:
    """Sequence of volumes in canonical orientation, min-max normalised.

    Items are `{"volume": (1, H, W, D) float32 in [0, 1], "name": str}`. Volumes are kept in memory after the first
    access, up to 4 GiB in total.

    Attributes:
        paths: paths of the files, sorted.
        shapes: shapes of the volumes; `None` until set by [`read_all`].

    Raises:
        InputError: on construction, if there are no volumes; on access, if a volume cannot be read.
    """

    def __init__(self, source: str | Path):
        self.paths = list_volumes(source)
        self.shapes: list[tuple[int, ...]] | None = None
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """The sha256 over names, sizes, and the first and last 4 KiB of the files.

        It includes the checksum at the end of each `.nii.gz` file, and does not depend on the path of the folder.
        """
        return files_fingerprint(
            (path.name if file == split(path)[0] else f"{path.name}/{file.name}", file)
            for path in self.paths
            for file in files_of(path)
        )

    def __getitem__(self, index: int) -> dict:
        import torch  # lazy, because listing files does not need torch

        from diffdiscover3d.data.transforms import min_max_normalize

        volume = self._cache.get(index)
        if volume is None:
            volume = min_max_normalize(torch.from_numpy(read_volume(self.paths[index]).data)[None])
            if self._cached_bytes + volume.nbytes <= _CACHE_BYTES:
                self._cache[index] = volume
                self._cached_bytes += volume.nbytes
        return {"volume": volume, "name": self.paths[index].name}
