"""Training options for files that cannot be read as they are."""

import dataclasses
from dataclasses import dataclass

from diffdiscover3d.training.options import added


@dataclass(frozen=True)
class ReadingConfig:
    """How the files of `dataset` are read; not for named, BraTS or Hub datasets. See [`ReadOptions`]."""

    volume: int | None = added(None, "volume, channel or time point of files with several, from 0")
    nan_to_zero: bool = added(False, "replace NaN and Inf voxels by 0")
    ignore_affine: bool = added(False, "use the voxel grid alone if the affine is unusable")
    series: str | None = added(None, "DICOM series of a folder with several: number or UID")
    resolution: int = added(0, "resolution of a pyramid, 0 the finest")
    missing_chunks: bool = added(False, "take chunks missing from a Zarr array as its fill value")
    voxel_size: str | None = added(None, "of files that give none, along x, y, z: 0.1,0.1,0.3um")
    include: tuple[str, ...] | None = added(None, "take files of these patterns though named like a mask or result")

    @property
    def reading(self) -> dict:
        """The options that are not at their defaults, as [`load_volumes`] takes them."""
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReadingConfig)}
        return {f.name: chosen[f.name] for f in dataclasses.fields(ReadingConfig) if chosen[f.name] != f.default}
