"""OME-Zarr images and plain Zarr arrays, by `zarr`; only the chunks that are asked for are read.

The metadata of OME-NGFF (versions 0.4 and 0.5) is read and written here: it is a few fields of JSON, and the libraries
that do it bring dask and cloud storage along. The tests open the results with `ome-zarr`.
"""

import contextlib
import json
import math
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
    need,
    pick,
)
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.staging import replaced_folder

NAME = "OME-Zarr"
EXTRA = "microscopy"
LABEL_SUFFIX = ".ome.zarr"
SUFFIXES = (".ome.zarr", ".zarr")
_MARKERS = ("zarr.json", ".zgroup", ".zarray")
_SPACE = ("z", "y", "x")
_OUTPUT_CHUNK = 64  # voxels along each axis
_UNIT_NAMES = {
    "m": "meter",
    "cm": "centimeter",
    "mm": "millimeter",
    "um": "micrometer",
    "nm": "nanometer",
    "angstrom": "angstrom",
    "inch": "inch",
}


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr group or array."""
    return path.is_dir() and any((path / marker).is_file() for marker in _MARKERS)


@dataclass(frozen=True)
class ZarrGrid(ResultGrid):
    """Label maps as an OME-NGFF label image of its own, `.ome.zarr`, with the scale and translation of the input.

    Attributes:
        scale, translation: along z, y, x, in `unit`.
        unit: as in `IN_MM`; `None` if unknown.
        zarr_format: of the input, 2 (OME-NGFF 0.4) or 3 (0.5).
        source: name of the input.
    """

    suffix: ClassVar[str] = LABEL_SUFFIX
    scale: tuple[float, float, float]
    translation: tuple[float, float, float]
    unit: str | None
    zarr_format: int
    source: str

    @contextlib.contextmanager
    def stream(self, path, dtype, shape, colours):
        zarr = need("zarr", EXTRA, str(path))
        planes = tuple(reversed(shape))
        with replaced_folder(path) as temporary:
            group = zarr.open_group(temporary, mode="w", zarr_format=self.zarr_format)
            group.attrs.update(self._metadata(colours))
            chunks = tuple(min(_OUTPUT_CHUNK, n) for n in planes)
            array = group.create_array(
                "0",
                shape=planes,
                dtype=np.dtype(dtype),
                chunks=chunks,
                fill_value=0,
                chunk_key_encoding={"name": "v2" if self.zarr_format == 2 else "default", "separator": "/"},
                dimension_names=_SPACE if self.zarr_format == 3 else None,
                config={"write_empty_chunks": True},  # a missing chunk is then damage
            )
            waiting, place = [], 0

            def write(values: np.ndarray) -> None:
                nonlocal waiting, place
                waiting.append(values)
                held = sum(map(len, waiting))
                whole = held if place + held == planes[0] else held // chunks[0] * chunks[0]
                if whole:  # whole chunks only: each is compressed once
                    block = np.concatenate(waiting)
                    array[place : place + whole] = block[:whole]
                    place += whole
                    waiting = [block[whole:]] if whole < held else []

            yield write

    def _metadata(self, colours) -> dict:
        axes = [{"name": n, "type": "space"} for n in _SPACE]
        if self.unit is not None:
            axes = [{**axis, "unit": _UNIT_NAMES[self.unit]} for axis in axes]
        transforms: list[dict] = [{"type": "scale", "scale": list(self.scale)}]
        if any(self.translation):
            transforms.append({"type": "translation", "translation": list(self.translation)})
        multiscales = [
            {
                "name": "parts",
                "axes": axes,
                "datasets": [{"path": "0", "coordinateTransformations": transforms}],
            }
        ]
        label = {
            "colors": [{"label-value": k, "rgba": [*rgb, 255]} for k, rgb in enumerate(colours)],
            "properties": [{"label-value": k, "name": f"part {k}"} for k in range(len(colours))],
            "source": {"image": f"../{self.source}"},
        }
        if self.zarr_format == 3:
            return {"ome": {"version": "0.5", "multiscales": multiscales, "image-label": label}}
        return {
            "multiscales": [{**multiscales[0], "version": "0.4"}],
            "image-label": {**label, "version": "0.4"},
        }


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions, inner: str | None = None) -> Iterator[VolumeFile]:
    """Open an image or array; channels and time points are chosen by `options.volume`.

    Args:
        inner: path of an image or array in the store; default: its root.

    Raises:
        InputError: if it is damaged, no image, or lacks chunks and `options.missing_chunks` is not set.
    """
    zarr = need("zarr", EXTRA, name)
    with damage_reported(name, "is a damaged Zarr store"):
        node = zarr.open(str(path / inner.strip("/") if inner else path), mode="r")
    levels, axes, scale, translation, units = _describe(name, node)
    if not levels:
        found = _list_images(node)
        listed = f"holds {', '.join(found[:6])}; name one as {path.name}::NAME" if found else "holds no image"
        raise InputError(f"{name}: has no OME-Zarr image at its root, {listed}.")
    if not 0 <= options.resolution < len(levels):
        raise InputError(
            f"{name}: has {len(levels)} resolution(s), numbered from 0; there is no resolution {options.resolution}."
        )
    with damage_reported(name, "is a damaged Zarr store"):
        array = node if levels == [""] else node[levels[options.resolution]]
        shape = tuple(array.shape)
    if len(shape) != len(axes):
        raise InputError(f"{name}: has {len(shape)} axes and describes {len(axes)}; convert it again.")
    if not set(_SPACE) <= set(axes):
        raise InputError(f"{name}: not a 3D volume but an image with the axes {', '.join(axes)}.")
    _check_chunks(name, array, options.missing_chunks)
    order = [axes.index(axis) for axis in _SPACE]
    others = [i for i in range(len(axes)) if i not in order]
    notes: list[str] = []
    grid = tuple(shape[i] for i in reversed(order))
    several = tuple(shape[i] for i in others)
    number = pick(name, (*grid, *several) if math.prod(several) > 1 else grid, options.volume, notes)
    place = dict(zip(others, map(int, np.unravel_index(number, several)), strict=True)) if others else {}
    factors, shift = scale[options.resolution], translation[options.resolution]
    unit = next((u for u in (units[i] for i in order) if u), None)
    mm = [IN_MM[units[i] or unit] if unit else 1.0 for i in order]
    affine = np.diag([*(factors[i] * m for i, m in zip(reversed(order), reversed(mm), strict=True)), 1.0])
    affine[:3, 3] = [shift[i] * m for i, m in zip(reversed(order), reversed(mm), strict=True)]
    if unit is None:
        notes.append("no voxel size is given: sizes are in voxels")

    def read(start: int, stop: int) -> np.ndarray:
        place[order[0]] = slice(start, stop)
        values = np.asarray(array[tuple(place.get(i, slice(None)) for i in range(len(axes)))])
        kept = sorted(order)
        return np.moveaxis(values, [kept.index(i) for i in order], [0, 1, 2])

    whole = [IN_MM[unit] if unit else 1.0] * 3
    yield VolumeFile(
        name,
        grid,
        np.dtype(array.dtype),
        affine,
        read,
        ZarrGrid(
            tuple(factors[i] * m / w for i, m, w in zip(order, mm, whole, strict=True)),
            tuple(shift[i] * m / w for i, m, w in zip(order, mm, whole, strict=True)),
            unit,
            int(array.metadata.zarr_format),
            path.name,
        ),
        unit=unit or UNKNOWN,
        orientation=IMAGE_ORIENTATION,
        anatomical=False,
        notes=notes,
    )


def _describe(name: str, node) -> tuple[list[str], list[str], list[list[float]], list[list[float]], list]:
    """Paths of the resolutions, axes, and for each resolution scale and translation; and the units of the axes."""
    if hasattr(node, "shape"):  # an array without any metadata: the last axes are z, y, x
        names = getattr(node.metadata, "dimension_names", None)
        axes = [str(n).lower() for n in names] if names and all(names) else []
        if not set(_SPACE) <= set(axes):
            axes = [f"axis {i}" for i in range(len(node.shape) - 3)] + list(_SPACE[-len(node.shape) :])
        return [""], axes, [[1.0] * len(axes)], [[0.0] * len(axes)], [None] * len(axes)
    with damage_reported(name, "has damaged OME-Zarr metadata"):
        attributes = dict(node.attrs)
        multiscales = (attributes.get("ome") or attributes).get("multiscales")
        if not multiscales:
            return [], [], [], [], []
        image = multiscales[0]
        axes = [a if isinstance(a, str) else a["name"] for a in image.get("axes", "tczyx")]
        units = [None if isinstance(a, str) else parse_unit(a.get("unit")) for a in image.get("axes", "tczyx")]
        paths, scales, translations = [], [], []
        common = _transform(image.get("coordinateTransformations"), len(axes))
        for dataset in image["datasets"]:
            scale, shift = _transform(dataset.get("coordinateTransformations"), len(axes))
            paths.append(str(dataset["path"]))
            scales.append([a * b for a, b in zip(scale, common[0], strict=True)])
            translations.append([a * b + c for a, b, c in zip(shift, common[0], common[1], strict=True)])
        return paths, axes, scales, translations, units


def _transform(transforms: list[dict] | None, count: int) -> tuple[list[float], list[float]]:
    scale, shift = [1.0] * count, [0.0] * count
    for transform in transforms or ():
        if "scale" in transform:
            factors = [float(f) for f in transform["scale"]]
            scale = [a * b for a, b in zip(scale, factors, strict=True)]
            shift = [a * b for a, b in zip(shift, factors, strict=True)]
        elif "translation" in transform:
            shift = [a + float(b) for a, b in zip(shift, transform["translation"], strict=True)]
        elif transform.get("type") != "identity":
            raise ValueError(f"the transformation {json.dumps(transform)[:80]} is none of OME-Zarr 0.4 or 0.5")
    return scale, shift


def _check_chunks(name: str, array, allowed: bool) -> None:
    """Refuse an array of which a chunk is missing.

    Writers may leave out chunks that hold nothing but the fill value, so this can be no damage: an option takes them.
    """
    with damage_reported(name, "is a damaged Zarr store"):
        total, there = int(array.nchunks), int(array.nchunks_initialized)
    if there < total and not allowed:
        raise InputError(
            f"{name}: {total - there:,} of {total:,} chunks are missing; copy it again, or --missing-chunks takes them "
            f"as {array.fill_value}."
        )


def _list_images(group, prefix: str = "") -> list[str]:
    """Paths of the images and 3D arrays in a group, not those of an image's resolutions or labels."""
    found = []
    for key, node in sorted(group.members()):
        place = f"{prefix}{key}"
        if hasattr(node, "shape"):
            if len(node.shape) >= 3:
                found.append(place)
            continue
        attributes = dict(node.attrs)
        if (attributes.get("ome") or attributes).get("multiscales"):
            found.append(place)
        else:
            found += _list_images(node, f"{place}/")
    return found
