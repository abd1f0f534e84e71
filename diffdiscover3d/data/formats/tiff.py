"""TIFF, ImageJ TIFF and OME-TIFF stacks, by `tifffile`."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
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

NAME = "TIFF"
EXTRA = "microscopy"
LABEL_SUFFIX = ".tif"
SUFFIXES = (".ome.tif", ".ome.tiff", ".tif", ".tiff", ".btf", ".lsm")
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DEPTH = "ZQI"  # axes that follow each other in space, where a file does not tell
_IMAGEJ_LIMIT = 2**31  # bytes; ImageJ's own files hold less than 4 GiB


def matches(start: bytes) -> bool:
    """Whether a file that begins with these bytes is one."""
    return start[:4] in _MAGIC


@dataclass(frozen=True)
class TiffGrid(ResultGrid):
    """Label maps as an ImageJ stack, which Fiji and napari open with its voxel size.

    Attributes:
        spacing: edge lengths along x, y, z in `unit`; `None` if unknown.
    """

    suffix: ClassVar[str] = LABEL_SUFFIX
    spacing: tuple[float, float, float] | None
    unit: str

    def with_spacing(self, spacing, unit):
        return TiffGrid(tuple(spacing), unit)

    @contextlib.contextmanager
    def stream(self, path, dtype, shape, colours):
        tifffile = need("tifffile", EXTRA, str(path))
        size = math.prod(shape) * np.dtype(dtype).itemsize
        options = {"metadata": {"axes": "ZYX"}, "imagej": size < _IMAGEJ_LIMIT, "bigtiff": size >= _IMAGEJ_LIMIT}
        if self.spacing is not None:
            unit = {"um": "um", "angstrom": "nm", "inch": "inch"}.get(self.unit, self.unit)
            x, y, z = (s * IN_MM[self.unit] / IN_MM[unit] for s in self.spacing)
            options["resolution"] = (1 / x, 1 / y)
            options["metadata"] |= {"spacing": z, "unit": unit}

        def make(temporary: Path):
            array = tifffile.memmap(temporary, shape=tuple(reversed(shape)), dtype=np.dtype(dtype), **options)
            return array, array.flush

        with mapped_file(path, ".tif", make) as write:
            yield write


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open the first series of a file; one of several channels or time points is chosen by `options.volume`.

    Raises:
        InputError: if it is damaged, RGB, flat, or compressed in a way that needs a library which is missing.
    """
    tifffile = need("tifffile", EXTRA, name)
    with contextlib.ExitStack() as stack:
        with damage_reported(name, "is a damaged TIFF file"), _strict(name):
            file = stack.enter_context(tifffile.TiffFile(path))
            if len(file.series) > 1 and {(s.axes, s.shape) for s in file.series} == {("YX", file.series[0].shape)}:
                # slices that were written one by one
                file = stack.enter_context(tifffile.TiffFile(path, is_shaped=False))
            levels = file.series[0].levels
        if options.resolution >= len(levels):
            found = f"has {len(levels)} resolution(s), numbered from 0"
            raise InputError(f"{name}: {found}; there is no resolution {options.resolution}.")
        series = levels[options.resolution]
        axes, shape = series.axes, series.shape
        if "S" in axes and shape[axes.index("S")] > 1:
            raise InputError(f"{name}: holds RGB voxels; convert it to one real number a voxel.")
        notes: list[str] = []
        depth = _depth_axis(name, axes, shape)
        others = {i: n for i, n in enumerate(shape) if i != depth and axes[i] not in "YX"}
        grid = tuple(shape[i] for i in (axes.index("X"), axes.index("Y"), depth))
        several = tuple(others.values()) if math.prod(others.values()) > 1 else ()
        number = pick(name, (*grid, *several), options.volume, notes)
        place = np.unravel_index(number, tuple(others.values())) if others else ()
        spacing, unit = _voxel_size(file, notes)
        if spacing is not None and options.resolution:
            full = levels[0].shape
            factors = [full[i] / shape[i] for i in (axes.index("X"), axes.index("Y"), depth)]
            spacing = tuple(s * f for s, f in zip(spacing, factors, strict=True))
        size = (1.0, 1.0, 1.0) if spacing is None else tuple(s * IN_MM[unit] for s in spacing)
        yield VolumeFile(
            name,
            grid,
            series.dtype,
            np.diag([*size, 1.0]),
            _plane_reader(path, name, series, depth, dict(zip(others, place, strict=True))),
            TiffGrid(spacing, unit),
            unit=unit if spacing is not None else UNKNOWN,
            orientation=IMAGE_ORIENTATION,
            anatomical=False,
            notes=notes,
        )


def _depth_axis(name: str, axes: str, shape: Sequence[int]) -> int:
    """Which axis of a series counts its slices."""
    if "X" not in axes or "Y" not in axes:
        raise InputError(f"{name}: has the axes {axes}, which are those of no stack of images.")
    for wanted in _DEPTH:
        if wanted in axes and shape[axes.index(wanted)] > 1:
            return axes.index(wanted)
    several = [f"{n} along {a}" for a, n in zip(axes, shape, strict=True) if a not in "YXS" and n > 1]
    what = f"a series of images ({', '.join(several)}) without an axis Z" if several else "a single image"
    raise InputError(f"{name}: is {what}; give a stack of at least two slices (axes ZYX).")


def _plane_reader(path: Path, name: str, series, depth: int, index: dict[int, int]) -> Callable[[int, int], np.ndarray]:
    """A function that reads planes: mapped where the file stores them as they are, otherwise page by page.

    Args:
        depth: the axis of the series that counts planes.
        index: where along the axes other than depth, Y and X.
    """
    axes, shape = series.axes, series.shape
    y, x = axes.index("Y"), axes.index("X")
    kept = [i for i in range(len(axes)) if i in (depth, y, x)]

    def cut(array: np.ndarray, start: int, stop: int) -> np.ndarray:
        place = tuple(slice(start, stop) if i == depth else index.get(i, slice(None)) for i in range(len(axes)))
        return np.moveaxis(array[place], [kept.index(depth), kept.index(y), kept.index(x)], [0, 1, 2])

    if series.dataoffset is not None and not series.is_multifile:
        with damage_reported(name, "is a truncated TIFF file"):
            mapped = np.memmap(
                path, np.dtype(series.parent.byteorder + series.dtype.char), "r", series.dataoffset, shape
            )
        return lambda start, stop: np.asarray(cut(mapped, start, stop))
    pages = math.prod(shape[:-2])
    if (y, x) == (len(axes) - 2, len(axes) - 1) and len(series.pages) == pages:

        def read_pages(start: int, stop: int) -> np.ndarray:
            planes = np.empty((stop - start, *shape[-2:]), series.dtype)
            for plane in range(start, stop):
                place = [plane if i == depth else index[i] for i in range(len(axes) - 2)]
                page = series.pages[int(np.ravel_multi_index(place, shape[:-2]))]
                if page is None:
                    raise InputError(f"{name}: slice {plane} is missing; copy it again.")
                with _strict(name), _decoders(name):
                    planes[plane - start] = page.asarray().reshape(shape[-2:])
            return planes

        return read_pages
    whole: list[np.ndarray] = []  # pages that hold several planes are read at once

    def read_whole(start: int, stop: int) -> np.ndarray:
        if not whole:
            with _strict(name), _decoders(name):
                whole.append(series.asarray())
        return cut(whole[0], start, stop)

    return read_whole


def _voxel_size(file, notes: list[str]) -> tuple[tuple[float, float, float] | None, str]:
    """Edge lengths along x, y, z and their unit; `None` if the file gives none that can be used."""
    found = None
    if file.is_ome:
        found = _ome_size(file.ome_metadata)
    elif file.is_lsm:
        lsm = file.lsm_metadata
        found = tuple(float(lsm[f"VoxelSize{axis}"]) for axis in "XYZ"), "m"
    else:
        found = _tag_size(file)
    if found is None or not all(np.isfinite(s) and s > 0 for s in found[0]):
        notes.append("no voxel size is given: sizes are in voxels")
        return None, "um"
    return found


def _ome_size(metadata: str) -> tuple[tuple[float, float, float], str] | None:
    import tifffile

    image = tifffile.xml2dict(metadata).get("OME", {}).get("Image", {})
    pixels = (image[0] if isinstance(image, list) else image).get("Pixels", {})
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "XYZ"]
    units = [parse_unit(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XYZ"]
    if None in sizes[:2] or None in units[:2]:
        return None
    in_mm = [None if s is None or u is None else float(s) * IN_MM[u] for s, u in zip(sizes, units, strict=True)]
    if in_mm[2] is None:
        return None
    return tuple(s / IN_MM[units[0]] for s in in_mm), units[0]


def _tag_size(file) -> tuple[tuple[float, float, float], str] | None:
    """From the resolution tags, and where ImageJ wrote the file, its spacing and unit."""
    tags, imagej = file.pages[0].tags, file.imagej_metadata or {}
    across = []
    for tag in ("XResolution", "YResolution"):
        value = tags.get(tag)
        top, bottom = value.value if value is not None else (0, 1)
        across.append(bottom / top if top else 0.0)
    unit = parse_unit(imagej.get("unit"))
    if unit is None:
        code = tags.get("ResolutionUnit")
        unit = {2: "inch", 3: "cm"}.get(int(code.value) if code is not None else 1)
        if imagej.get("unit") or "spacing" not in imagej:
            # dots per inch of a screen or printer are no size of a voxel, and nothing is known of the slices
            return None
    if unit is None or 0.0 in across or "spacing" not in imagej:
        return None
    return (*across, abs(float(imagej["spacing"]))), unit


@contextlib.contextmanager
def _strict(name: str) -> Iterator[None]:
    """What `tifffile` logs of damage, and reads around, is an error here."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    logger, handler = logging.getLogger("tifffile"), Keep(logging.ERROR)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
    if found:
        raise InputError(f"{name}: is a truncated or damaged TIFF file ({found[0][:150]}); copy it again.")


@contextlib.contextmanager
def _decoders(name: str) -> Iterator[None]:
    """A missing decoder is named with the line that installs it."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if "imagecodecs" not in str(error):
            raise
        raise InputError(f'{name}: its compression needs imagecodecs: pip install "diffdiscover3d[{EXTRA}]"') from error
