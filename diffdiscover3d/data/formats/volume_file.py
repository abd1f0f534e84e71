"""The interface between formats and the rest: an open volume read by planes, and results written by planes."""

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation

from diffdiscover3d.data.formats.nifti.output import nifti_stream, output_header
from diffdiscover3d.data.formats.nifti.voxels import pick_volume
from diffdiscover3d.data.formats.stamps import StampedFiles
from diffdiscover3d.data.formats.units import IN_MM
from diffdiscover3d.errors import DiffDiscoverError, InputError
from diffdiscover3d.utils.files import atomic_file

# Images of microscopes have their first row at the top. Half a turn around the first axis brings them upright for
# pictures that have "anterior" at the top, and keeps their handedness.
IMAGE_ORIENTATION = np.array([[0, 1], [1, -1], [2, -1]], dtype=float)
# An array without a convention is taken as (H, W, D) in canonical orientation: its last axis varies fastest.
ARRAY_ORIENTATION = np.array([[2, 1], [1, 1], [0, 1]], dtype=float)


@dataclass(frozen=True)
class ReadOptions:
    """How unusual files are read.

    Attributes:
        volume: which one of several volumes in a file, from 0 (time points, channels, gradient directions).
        series: of a DICOM folder: a Series Instance UID or series number.
        resolution: of a multi-resolution file: which level, 0 the finest.
        missing_chunks: take chunks that a Zarr array lacks as its fill value.
        voxel_size: edge lengths of a voxel along the first, second and third axis of the grid and their unit, where
            the file gives none or wrong ones; see [`parse_voxel_size`].
    """

    volume: int | None = None
    series: str | None = None
    resolution: int = 0
    missing_chunks: bool = False
    voxel_size: str | None = None


class ResultGrid(ABC):
    """Writes results on the grid of a file, in the family of its format.

    Attributes:
        suffix: ending of label maps.
    """

    suffix: ClassVar[str]

    def with_spacing(self, spacing: Sequence[float], unit: str) -> "ResultGrid":
        """The same for another voxel size, where the format keeps one; otherwise results stay on the file's own."""
        return self

    @abstractmethod
    def stream(
        self, path: str | Path, dtype: np.dtype, shape: Sequence[int], colours: Sequence[tuple[int, int, int]]
    ) -> contextlib.AbstractContextManager[Callable[[np.ndarray], None]]:
        """Write a label map atomically: yields a function that takes (n, ny, nx) planes in their order.

        Args:
            path: target ending in `suffix`.
            dtype: uint8 or uint16.
            shape: (nx, ny, nz).
            colours: red, green and blue from 0 to 255 of each part, where the format keeps them.

        Raises:
            OutputError: if it cannot be written.
        """


@dataclass(frozen=True)
class NiftiGrid(ResultGrid):
    """Label maps as `.nii.gz`, for every medical format.

    Attributes:
        header: of the file, or one that gives the same grid.
    """

    suffix: ClassVar[str] = ".nii.gz"
    header: nib.Nifti1Header

    @contextlib.contextmanager
    def stream(self, path, dtype, shape, colours):
        header = output_header(self.header, np.dtype(dtype), tuple(shape), labels=True)
        with nifti_stream(path, header) as write:
            yield lambda planes: write(planes.T)


@dataclass
class VolumeFile:
    """An open volume of any format.

    Attributes:
        name: of the file, for messages.
        shape: (nx, ny, nz) on its own axes, the fastest one first.
        dtype: of the stored numbers.
        affine: (4, 4) from indices on its own axes to world space, in mm.
        read: gives the stored numbers of planes `start` to `stop`, (stop - start, ny, nx); raises an OSError,
            ValueError or InputError if they are damaged.
        results: writes results on its grid.
        unit: of the file, a key of `IN_MM`, or `UNKNOWN`.
        orientation: which canonical axis each of its own lies along, and in which direction, as
            `nibabel.orientations.io_orientation` gives it (default: that of the affine).
        anatomical: its axes are right, anterior, superior of a patient; otherwise just x, y, z.
        scaling: slope and intercept of the stored numbers, `None` for 1 and 0.
        header: a NIfTI header with its grid (default: made from the affine).
        notes: what was unusual, in words for the user.
        files: what it was read from; set by [`open_volume`].
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    affine: np.ndarray
    read: Callable[[int, int], np.ndarray]
    results: ResultGrid | None = None
    unit: str = "mm"
    orientation: np.ndarray | None = None
    anatomical: bool = True
    scaling: tuple[float, float] | None = None
    header: nib.Nifti1Header | None = None
    notes: list[str] = field(default_factory=list)
    files: StampedFiles | None = None

    def __post_init__(self):
        self.dtype = np.dtype(self.dtype)
        self.shape = tuple(int(n) for n in self.shape)
        check_grid(self.name, self.shape, self.dtype)
        check_affine(self.name, self.affine)
        if self.orientation is None:
            self.orientation = io_orientation(self.affine)
        if self.header is None:
            self.header = nifti_header(self.affine, self.shape)
        if self.results is None:
            self.results = NiftiGrid(self.header)

    @property
    def path(self) -> Path:
        """Its name as a path."""
        return Path(self.name)

    @property
    def reading_bytes(self) -> float:
        """The most memory that reading it whole takes, in bytes: as stored, and two float32 copies."""
        return float(np.prod(np.array(self.shape, float))) * (8 + self.dtype.itemsize)

    def with_spacing(self, spacing: Sequence[float], unit: str) -> "VolumeFile":
        """The same volume with another voxel size, along its own axes, in a unit of `IN_MM`."""
        affine = self.affine.copy()
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        affine[:3, :3] *= np.asarray(spacing, dtype=float) * IN_MM[unit] / lengths
        # of NIfTI, the header is made anew
        results = None if isinstance(self.results, NiftiGrid) else self.results.with_spacing(spacing, unit)
        return replace(
            self,
            results=results,
            affine=affine,
            unit=unit,
            header=None,
            notes=[n for n in self.notes if "voxel size" not in n],
        )

    def read_planes(self, start: int, stop: int) -> np.ndarray:
        """The stored numbers of whole planes, (stop - start, ny, nx).

        Raises:
            InputError: if they are damaged.
        """
        with damage_reported(self.name):
            planes = self.read(start, stop)
        if planes.shape != (stop - start, self.shape[1], self.shape[0]):
            raise InputError(f"{self.name}: truncated, some of its planes are missing; copy it again.")
        return planes


def check_grid(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse what is no volume of real numbers with at least two voxels along each axis."""
    if len(shape) != 3 or min(shape) < 2:
        raise InputError(f"{name}: not a 3D volume but of shape {tuple(shape)}; give one of at least two slices.")
    if dtype.kind == "b":
        return
    if dtype.kind not in "iuf":
        kind = "complex" if dtype.kind == "c" else "RGB" if dtype.fields else str(dtype)
        raise InputError(f"{name}: holds {kind} voxels; convert it to one real number a voxel.")


def check_affine(name: str, affine: np.ndarray) -> None:
    """Refuse an affine that gives no place in space."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    usable = np.isfinite(affine).all() and (lengths > 0).all()
    if not usable or abs(np.linalg.det(affine[:3, :3] / lengths)) <= 1e-4:
        raise InputError(
            f"{name}: its voxel size or axes are zero, NaN or not invertible; --voxel-size gives the size of a voxel."
        )


def nifti_header(affine: np.ndarray, shape: Sequence[int]) -> nib.Nifti1Header:
    """A NIfTI header for the grid of another format; voxels below 5 µm are given in µm, others in mm."""
    small = np.linalg.norm(affine[:3, :3], axis=0).max() < 5e-3
    scaled = affine.copy()
    if small:
        scaled[:3] /= IN_MM["um"]
    header = nib.Nifti1Header()
    header.set_data_shape(tuple(min(int(n), 32767) for n in shape))
    header.set_xyzt_units("micron" if small else "mm")
    header.set_sform(scaled, 1)
    directions = scaled[:3, :3] / np.linalg.norm(scaled[:3, :3], axis=0)
    if np.abs(directions.T @ directions - np.eye(3)).max() < 1e-4:
        header.set_qform(scaled, 1)
    else:  # a quaternion cannot describe shear
        header["pixdim"][1:4] = np.linalg.norm(scaled[:3, :3], axis=0)
    return header


def pick(name: str, shape: Sequence[int], volume: int | None, notes: list[str]) -> int:
    """The number of the volume to take, of an array whose axes after the first three count volumes."""
    return pick_volume(Path(name), tuple(shape), volume, notes)


def need(module: str, extra: str, name: str) -> ModuleType:
    """Import the library that reads a format.

    Raises:
        InputError: if it is not installed, with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f'{name}: reading it needs {module.split(".")[0]}: pip install "diffdiscover3d[{extra}]"'
        ) from error


@contextlib.contextmanager
def damage_reported(name: str, what: str = "cannot be read") -> Iterator[None]:
    """Context in which any exception that a library raises for a damaged file becomes an error of one line."""
    try:
        yield
    except (DiffDiscoverError, MemoryError):
        raise
    except Exception as error:  # libraries raise many kinds for damaged files
        raise InputError(f"{name}: {what} ({one_line(error)}); copy or convert it again.") from error


def one_line(error: BaseException) -> str:
    """The most telling line of an error, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line] or lines
    return (telling[-1] if telling else type(error).__name__)[:200].rstrip(".")


@contextlib.contextmanager
def mapped_file(
    path: str | Path, suffix: str, make: Callable[[Path], tuple[np.ndarray, Callable[[], None]]]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a file through an array that its library keeps on disk.

    Args:
        path, suffix: as for [`atomic_file`].
        make: creates the file under a temporary path; returns its array, the slowest axis first, and what closes it.
    """
    with atomic_file(path, suffix) as temporary:
        array, close = make(temporary)
        place = 0

        def write(planes: np.ndarray) -> None:
            nonlocal place
            array[place : place + len(planes)] = planes
            place += len(planes)

        try:
            yield write
        finally:
            close()
