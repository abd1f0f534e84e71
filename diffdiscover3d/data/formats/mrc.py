"""MRC, CCP4 and map files of electron microscopy, by `mrcfile`. Lengths are in Å, the origin is kept."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from diffdiscover3d.data.formats.units import IN_MM, UNKNOWN
from diffdiscover3d.data.formats.volume_file import (
    ReadOptions,
    ResultGrid,
    VolumeFile,
    damage_reported,
    mapped_file,
    need,
    pick,
)
from diffdiscover3d.errors import InputError

NAME = "MRC"
EXTRA = "microscopy"
LABEL_SUFFIX = ".mrc"
SUFFIXES = (".mrc", ".map", ".ccp4", ".rec", ".mrc.gz", ".map.gz", ".ccp4.gz", ".rec.gz")
_COMPLEX = {3: "complex", 4: "complex", 16: "RGB"}
_GRID_FIELDS = ("nxstart", "nystart", "nzstart", "mx", "my", "mz", "cella", "cellb", "mapc", "mapr", "maps", "origin")


def matches(start: bytes) -> bool:
    """Whether a file that begins with these bytes is one."""
    return start[208:211] == b"MAP"


@dataclass(frozen=True)
class MrcGrid(ResultGrid):
    """Label maps as `.mrc` with the cell, start and origin of the file; ChimeraX opens them over it.

    Attributes:
        fields: of the header, by name, that place the grid.
    """

    suffix: ClassVar[str] = LABEL_SUFFIX
    fields: dict

    @contextlib.contextmanager
    def stream(self, path, dtype, shape, colours):
        mrcfile = need("mrcfile", EXTRA, str(path))
        mode = 0 if len(colours) <= 128 else 6  # int8 or uint16: the format has no uint8

        def make(temporary: Path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                file = mrcfile.new_mmap(temporary, tuple(reversed(shape)), mode, overwrite=True)
            for name, value in self.fields.items():
                file.header[name] = value
            file.header.ispg = 1
            file.header.dmin, file.header.dmax, file.header.dmean, file.header.rms = 0, -1, -2, -1  # not determined
            file.header.nlabl = 1
            file.header.label[0] = b"parts found by diffdiscover3d"
            return file.data, file.close

        with mapped_file(path, ".mrc", make) as write:
            yield lambda planes: write(planes.astype(np.int8 if mode == 0 else np.uint16))


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open a volume; one of a stack of volumes is chosen by `options.volume`.

    Raises:
        InputError: if it is damaged, complex, or a single image.
    """
    mrcfile = need("mrcfile", EXTRA, name)
    zipped = path.name.endswith(".gz")
    with contextlib.ExitStack() as stack:
        with damage_reported(name, "is a damaged MRC file"):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # mrcfile warns of what is checked here
            header = stack.enter_context(mrcfile.open(path, header_only=True)).header.copy()
        columns, rows, sections = (int(header[n]) for n in ("nx", "ny", "nz"))
        mode = int(header["mode"])
        if mode in _COMPLEX:
            raise InputError(f"{name}: holds {_COMPLEX[mode]} voxels; convert it to one real number a voxel.")
        if min(columns, rows, sections) < 1 or max(columns, rows, sections) > 2**20:
            raise InputError(f"{name}: its header gives the impossible shape {(columns, rows, sections)}.")
        with damage_reported(name, "is a truncated or damaged MRC file"):
            opened = stack.enter_context(mrcfile.open(path) if zipped else mrcfile.mmap(path))
            data = opened.data
        notes: list[str] = []
        if data.ndim == 2:
            raise InputError(f"{name}: is a single image; give a volume of at least two sections.")
        count = data.shape[0] if data.ndim == 4 else 1
        number = pick(name, (*data.shape[:-4:-1], *([count] if data.ndim == 4 else [])), options.volume, notes)
        volume = data[number] if data.ndim == 4 else data
        affine, known, order = _affine(name, header, notes)
        fields = {field: header[field] for field in _GRID_FIELDS}
        if data.ndim == 4:
            fields["mz"] = volume.shape[0]
        yield VolumeFile(
            name,
            volume.shape[::-1],
            volume.dtype,
            affine,
            lambda start, stop: np.asarray(volume[start:stop]),
            MrcGrid(fields),
            unit="angstrom" if known else UNKNOWN,
            orientation=np.array([[axis, 1.0] for axis in order]),
            anatomical=False,
            notes=notes,
        )


def _affine(name: str, header, notes: list[str]) -> tuple[np.ndarray, bool, list[int]]:
    """From column, row and section to x, y, z in mm; whether a voxel size is given; the axes of the stored ones."""
    order = [int(header[n]) - 1 for n in ("mapc", "mapr", "maps")]
    if sorted(order) != [0, 1, 2]:
        if any(order[i] != -1 for i in range(3)):
            raise InputError(f"{name}: its header orders the axes as {[i + 1 for i in order]}; convert it again.")
        order = [0, 1, 2]  # old programs leave them 0
    cell = np.array([float(header["cella"][axis]) for axis in "xyz"])
    steps = np.array([int(header[n]) for n in ("mx", "my", "mz")], dtype=float)
    angles = [float(header["cellb"][n]) for n in ("alpha", "beta", "gamma")]
    if any(abs(a - 90) > 0.1 for a in angles if a):
        notes.append(f"the cell has the angles {', '.join(f'{a:g}' for a in angles)}: its axes are taken as orthogonal")
    known = bool((cell > 0).all() and (steps > 0).all() and np.isfinite(cell).all())
    size = cell / steps * IN_MM["angstrom"] if known else np.ones(3)
    if not known:
        notes.append("no voxel size is given: sizes are in voxels")
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    start = np.array([int(header[n]) for n in ("nxstart", "nystart", "nzstart")], dtype=float)
    for stored, axis in enumerate(order):
        affine[axis, stored] = size[axis]
        affine[axis, 3] = start[stored] * size[axis]
    origin = np.array([float(header["origin"][axis]) for axis in "xyz"])
    if known and origin.any():  # of the two that files give, ChimeraX takes the origin where it is not 0
        affine[:3, 3] = origin * IN_MM["angstrom"]
    return affine, known, order
