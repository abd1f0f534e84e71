"""HDF5 datasets, by `h5py`: `file.h5::/path/in/it`, or the only volume of a file."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from diffdiscover3d.data.formats.units import IN_MM, UNKNOWN, parse_unit
from diffdiscover3d.data.formats.volume_file import (
    IMAGE_ORIENTATION,
    ReadOptions,
    ResultGrid,
    VolumeFile,
    damage_reported,
    mapped_file,
    need,
    pick,
)
from diffdiscover3d.errors import InputError

NAME = "HDF5"
EXTRA = "microscopy"
LABEL_SUFFIX = ".h5"
SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
# attributes of a dataset that place it: element_size_um is written by Fiji and ilastik, resolution by CREMI (in nm);
# all along z, y, x
_SIZES = (("element_size_um", "um"), ("resolution", "nm"), ("voxel_size", None), ("spacing", None))
_KEPT = ("element_size_um", "resolution", "voxel_size", "spacing", "offset", "unit", "units", "axes")


def matches(start: bytes) -> bool:
    """Whether a file that begins with these bytes is one."""
    return start[:8] == b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Hdf5Grid(ResultGrid):
    """Label maps as the dataset `/labels` of a new `.h5` file, with the attributes that place the input's.

    Attributes:
        attributes: of the input's dataset, by name.
    """

    suffix: ClassVar[str] = LABEL_SUFFIX
    attributes: dict

    @contextlib.contextmanager
    def stream(self, path, dtype, shape, colours):
        h5py = need("h5py", EXTRA, str(path))

        def make(temporary: Path):
            file = h5py.File(temporary, "w")
            planes = tuple(reversed(shape))
            chunks = tuple(min(64, n) for n in planes)
            dataset = file.create_dataset("labels", planes, dtype, chunks=chunks, compression="gzip", shuffle=True)
            dataset.attrs.update(self.attributes)
            return dataset, file.close

        with mapped_file(path, ".h5", make) as write:
            yield write


def list_datasets(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The datasets of a file that may be volumes, with their shapes.

    Raises:
        InputError: if the file is damaged.
    """
    h5py = need("h5py", EXTRA, name)
    found: dict[str, tuple[int, ...]] = {}

    def look(key: str, item) -> None:
        if isinstance(item, h5py.Dataset) and len(item.shape or ()) >= 3 and item.dtype.kind in "iufb":
            found[f"/{key}"] = item.shape

    with damage_reported(name, "is a damaged HDF5 file"), h5py.File(path, "r") as file:
        file.visititems(look)
    return found


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions, inner: str | None = None) -> Iterator[VolumeFile]:
    """Open a dataset whose last three axes are z, y, x; one of several volumes is chosen by `options.volume`.

    Args:
        inner: path in the file; default: its only volume.

    Raises:
        InputError: if the file is damaged, or holds no such dataset, or several and none was named.
    """
    h5py = need("h5py", EXTRA, name)
    if inner is None:
        found = list_datasets(path, name)
        if len(found) != 1:
            listed = ", ".join(f"{key} {'×'.join(map(str, shape))}" for key, shape in list(found.items())[:6])
            what = f"holds {len(found)} datasets ({listed}); name one" if found else "holds no volume; name a dataset"
            raise InputError(f"{name}: {what} as {path.name}::/path.")
        inner = next(iter(found))
    with contextlib.ExitStack() as stack:
        with damage_reported(name, "is a damaged HDF5 file"):
            file = stack.enter_context(h5py.File(path, "r"))
            dataset = file.get(inner)
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{name}: has no dataset {inner}; `diffdiscover3d list {path.name}` shows what it holds.")
        shape = dataset.shape
        if len(shape) < 3:
            raise InputError(f"{name}: not a 3D volume but of shape {shape}; give one of at least two slices.")
        notes: list[str] = []
        number = pick(name, (*shape[:-4:-1], *shape[:-3]), options.volume, notes)
        place = np.unravel_index(number, shape[:-3]) if len(shape) > 3 else ()
        attributes = {key: dataset.attrs[key] for key in _KEPT if key in dataset.attrs}
        affine, unit = _affine(attributes, notes)
        kept = attributes if len(shape) == 3 else {k: v for k, v in attributes.items() if k != "axes"}
        yield VolumeFile(
            name,
            shape[:-4:-1],
            dataset.dtype,
            affine,
            lambda start, stop: dataset[(*place, slice(start, stop))],
            Hdf5Grid(kept),
            unit=unit,
            orientation=IMAGE_ORIENTATION,
            anatomical=False,
            notes=notes,
        )


def _affine(attributes: dict, notes: list[str]) -> tuple[np.ndarray, str]:
    for key, default in _SIZES:
        size = np.atleast_1d(np.asarray(attributes.get(key, ()), dtype=object)).ravel()
        unit = default or parse_unit(_text(attributes.get("unit", attributes.get("units"))))
        try:
            size = size[-3:].astype(float)
        except (TypeError, ValueError):
            continue
        if unit and len(size) == 3 and (size > 0).all() and np.isfinite(size).all():
            affine = np.diag([*size[::-1] * IN_MM[unit], 1.0])
            offset = np.atleast_1d(np.asarray(attributes.get("offset", ()))).ravel()
            if len(offset) >= 3 and offset.dtype.kind in "iuf":
                affine[:3, 3] = offset[-3:][::-1] * IN_MM[unit]
            return affine, unit
    notes.append("no voxel size is given: sizes are in voxels")
    return np.eye(4), UNKNOWN


def _text(value) -> str | None:
    value = value.decode() if isinstance(value, bytes) else value
    return value if isinstance(value, str) else None
