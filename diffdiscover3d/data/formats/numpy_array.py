"""NumPy arrays, `.npy` and `.npz`: (H, W, D) as functions of this package take them. They have no voxel size."""

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from diffdiscover3d.data.formats.units import UNKNOWN
from diffdiscover3d.data.formats.volume_file import (
    ARRAY_ORIENTATION,
    ReadOptions,
    ResultGrid,
    VolumeFile,
    damage_reported,
    mapped_file,
    pick,
)
from diffdiscover3d.errors import InputError

NAME = "NumPy"
EXTRA = None
LABEL_SUFFIX = ".npy"
SUFFIXES = (".npy", ".npz")


def matches(start: bytes) -> bool:
    """Whether a file that begins with these bytes is one."""
    return start[:6] == b"\x93NUMPY"


@dataclass(frozen=True)
class NumpyGrid(ResultGrid):
    """Label maps as `.npy` of the same shape."""

    suffix: ClassVar[str] = LABEL_SUFFIX

    @contextlib.contextmanager
    def stream(self, path, dtype, shape, colours):
        def make(temporary: Path):
            array = np.lib.format.open_memmap(temporary, "w+", np.dtype(dtype), tuple(reversed(shape)))
            return array, array.flush

        with mapped_file(path, ".npy", make) as write:
            yield write


def list_arrays(path: Path, name: str) -> list[str]:
    """The names of the arrays in a `.npz` file."""
    with damage_reported(name, "is a damaged NumPy file"), zipfile.ZipFile(path) as file:
        return [n.removesuffix(".npy") for n in file.namelist()]


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions, inner: str | None = None) -> Iterator[VolumeFile]:
    """Open an array of three axes, or one of several such volumes (N, H, W, D) by `options.volume`.

    Args:
        inner: name of the array in a `.npz` file; default: its only one.

    Raises:
        InputError: if it is damaged, holds Python objects, or several arrays and none was named.
    """
    with damage_reported(name, "is a damaged NumPy file"):
        if path.suffix == ".npz":
            names = list_arrays(path, name)
            if inner is None and len(names) != 1:
                raise InputError(
                    f"{name}: holds {len(names)} arrays ({', '.join(names[:6])}); name one as {path.name}::NAME."
                )
            if inner is not None and inner not in names:
                raise InputError(f"{name}: has no array {inner}, but {', '.join(names[:6])}.")
            with np.load(path, allow_pickle=False) as file:
                array = file[inner or names[0]]
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # Python objects are never loaded
    if array.ndim < 3:
        raise InputError(f"{name}: not a 3D volume but of shape {array.shape}; give one of shape (H, W, D).")
    notes: list[str] = ["no voxel size is given: sizes are in voxels"]
    number = pick(name, (*array.shape[:-4:-1], *array.shape[:-3]), options.volume, notes)
    volume = array[np.unravel_index(number, array.shape[:-3])] if array.ndim > 3 else array
    yield VolumeFile(
        name,
        volume.shape[::-1],
        volume.dtype,
        np.eye(4)[[2, 1, 0, 3]],  # x is the first axis of the array
        lambda start, stop: np.asarray(volume[start:stop]),
        NumpyGrid(),
        unit=UNKNOWN,
        orientation=ARRAY_ORIENTATION,
        anatomical=False,
        notes=notes,
    )
