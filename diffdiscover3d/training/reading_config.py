"""Training options for files that cannot be read as they are."""

import dataclasses
from dataclasses import dataclass, field


def _option(default, help: str):
    return field(default=default, metadata={"help": help, "choices": None, "record_default": False})


@dataclass(frozen=True)
class ReadingConfig:
    """How the files of `dataset` are read; not for named, BraTS or Hub datasets. See [`ReadOptions`]."""

    volume: int | None = _option(None, "volume, channel or time point of files with several, from 0")
    nan_to_zero: bool = _option(False, "replace NaN and Inf voxels by 0")
    ignore_affine: bool = _option(False, "use the voxel grid alone if the affine is unusable")
    series: str | None = _option(None, "DICOM series of a folder with several: number or UID")
    resolution: int = _option(0, "level of a pyramid, 0 the finest")
    missing_chunks: bool = _option(False, "take chunks missing from a Zarr array as its fill value")
    voxel_size: str | None = _option(None, "of files that give none, along x, y, z: 0.1,0.1,0.3um")
    include: tuple[str, ...] | None = _option(None, "take files of these patterns though named like a mask or result")

    @property
    def reading(self) -> dict:
        """The options that are not at their defaults, as [`load_volumes`] takes them."""
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReadingConfig)}
        return {f.name: chosen[f.name] for f in dataclasses.fields(ReadingConfig) if chosen[f.name] != f.default}
