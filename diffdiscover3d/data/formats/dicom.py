"""DICOM series, by `pydicom` (headers) and `SimpleITK` (voxels). Label maps are NIfTI with the same place in space."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.sitk import LPS_TO_RAS
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile, need, one_line, pick
from diffdiscover3d.errors import InputError

NAME = "DICOM"
EXTRA = "dicom"
SUFFIXES = (".dcm", ".dicom", ".ima")
_TAGS = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "Modality",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_UNEVEN = 0.05  # of the distance between slices, by which one may differ


@dataclass(frozen=True)
class Slice:
    """The place of one image of a series.

    Attributes:
        path: its file; `frame`: which one of several in it.
        number: Instance Number.
        position: (3,) of its first voxel, in mm, towards left, posterior, superior.
        grid: rows, columns, directions and voxel size, which all slices of a volume share.
        syntax: name of the transfer syntax.
    """

    path: Path
    frame: int
    number: int
    position: np.ndarray
    grid: tuple
    syntax: str = "unknown"


@dataclass
class Series:
    """The images of one series.

    Attributes:
        uid: Series Instance UID; `number`: Series Number, `None` if it has none.
        modality, description: as in the files.
        slices: in no order.
        fault: why it is no volume, `None` if it is one.
    """

    uid: str
    number: int | None
    modality: str
    description: str
    slices: list[Slice]
    fault: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of its first file."""
        return self.slices[0].path.parent if self.slices else Path()


def matches(start: bytes) -> bool:
    """Whether a file that begins with these bytes is one."""
    return start[128:132] == b"DICM"


def list_series(paths: Iterable[Path], name: str) -> tuple[list[Series], dict[Path, str]]:
    """The series that files belong to, and the files that belong to none, with the reason.

    Args:
        paths: DICOM files.
        name: of what they were found in, for messages.

    Raises:
        InputError: if `pydicom` is missing.
    """
    pydicom = need("pydicom", EXTRA, name)
    logging.getLogger("pydicom").setLevel(logging.ERROR)  # warns of odd values in headers, which are checked here
    found: dict[str, Series] = {}
    left_out: dict[Path, str] = {}
    for path in paths:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
            slices = list(_slices(path, header))
        except Exception as error:  # pydicom raises many kinds for damaged headers
            left_out[path] = f"a damaged DICOM file ({one_line(error)})"
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        if not header.get("Rows") or not uid:
            left_out[path] = "a DICOM file without an image"
            continue
        series = found.get(uid)
        if series is None:
            number = header.get("SeriesNumber")
            series = found[uid] = Series(
                uid,
                None if number is None else int(number),
                str(header.get("Modality", "")),
                str(header.get("SeriesDescription", "")),
                [],
            )
        if int(header.get("SamplesPerPixel", 1)) != 1:
            series.fault = "holds RGB voxels"
        elif not slices:
            series.fault = series.fault or "its images have no position in space"
        series.slices += slices or [Slice(path, 0, 0, np.zeros(3), ())]
    return sorted(found.values(), key=lambda s: (s.number is None, s.number or 0, s.uid)), left_out


def _slices(path: Path, header) -> Iterator[Slice]:
    """The images in a file that have a place in space."""
    frames = int(header.get("NumberOfFrames") or 1)
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for frame in range(frames):
        groups = [g for g in (per_frame[frame] if frame < len(per_frame) else None, shared) if g is not None]
        position = _value(header, groups, "PlanePositionSequence", "ImagePositionPatient")
        directions = _value(header, groups, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = _value(header, groups, "PixelMeasuresSequence", "PixelSpacing")
        if position is None or directions is None or spacing is None or (frames > 1 and not per_frame):
            return
        grid = (
            int(header.Rows),
            int(header.Columns),
            tuple(round(float(d), 4) for d in directions),
            tuple(round(float(s), 5) for s in spacing),
        )
        number = int(header.get("InstanceNumber") or 0)
        syntax = getattr(header.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        yield Slice(path, frame, number, np.array([float(x) for x in position]), grid, syntax)


def _value(header, groups: Sequence, sequence: str, key: str):
    for group in groups:
        inner = group.get(sequence)
        if inner and inner[0].get(key) is not None:
            return inner[0].get(key)
    return header.get(key)


def choose_series(series: Sequence[Series], wanted: str | None, name: str) -> Series:
    """The series that was asked for by UID or number, or the only one that is a volume.

    Raises:
        InputError: if there is no such series, or there are several and none was asked for.
    """
    if wanted is not None:
        chosen = [s for s in series if wanted in (s.uid, str(s.number))]
        chosen = [s for s in chosen if fault_of(s) is None] or chosen
        if len(chosen) != 1:
            listed = ", ".join(str(s.number) if s.number is not None else s.uid for s in series)
            what = f"has no series {wanted}" if not chosen else f"has several series {wanted}; give its UID"
            raise InputError(f"{name}: {what}; it holds {listed}.")
        return chosen[0]
    usable = [s for s in series if fault_of(s) is None]
    if len(usable) == 1:
        return usable[0]
    if not usable:
        what = f"series {_label(series[0])} {fault_of(series[0])}" if series else "no DICOM images"
        raise InputError(f"{name}: holds no DICOM volume: {what}.")
    listed = "; ".join(f"{_label(s)} ({len(s.slices)} images)" for s in usable[:8])
    raise InputError(f"{name}: holds {len(usable)} DICOM series: {listed}; choose one with --series NUMBER or UID.")


def _label(series: Series) -> str:
    number = series.uid if series.number is None else str(series.number)
    return f"{number} {series.modality} {series.description}".strip()


def fault_of(series: Series) -> str | None:
    """Why a series is no volume, `None` if it is one."""
    try:
        _stack(series)
    except InputError as error:
        return str(error)
    return None


def _stack(series: Series) -> tuple[list[list[Slice]], np.ndarray, list[str]]:
    """The slices of every volume in their order in space, the affine in mm to left, posterior, superior, and notes.

    Raises:
        InputError: with the reason alone, if they make no volume.
    """
    if series.fault:
        raise InputError(series.fault)
    grids = {s.grid for s in series.slices}
    if len(grids) > 1:
        raise InputError(f"mixes {len(grids)} image sizes or directions, as localizers do")
    _, _, directions, (row_step, column_step) = grids.pop()
    along, down = np.array(directions[:3]), np.array(directions[3:])
    normal = np.cross(along, down)
    if not np.isfinite(normal).all() or abs(np.linalg.norm(normal) - 1) > 0.02:
        raise InputError("has directions that are not at right angles")
    places: dict[float, list[Slice]] = {}
    for part in sorted(series.slices, key=lambda s: (float(s.position @ normal), s.number, s.frame)):
        depth = float(part.position @ normal)
        near = next((d for d in reversed(places) if abs(d - depth) < 1e-3), None)
        places.setdefault(depth if near is None else near, []).append(part)
    depths = np.array(list(places))
    if len(depths) < 2:
        raise InputError("has images at one position only, at least two are needed")
    counts = {len(found) for found in places.values()}
    if len(counts) > 1:
        raise InputError(f"is incomplete: its positions have {min(counts)} to {max(counts)} images each")
    steps = np.diff(depths)
    step = float(np.median(steps))
    uneven = np.abs(steps - step) > _UNEVEN * step
    if uneven.any():
        place = int(np.flatnonzero(uneven)[0])
        lacking = int((np.round(steps[uneven] / step) - 1).clip(0).sum())
        what = f"lacks about {lacking} slice(s)" if lacking else "has slices at uneven distances"
        raise InputError(f"{what}, first between {depths[place]:.2f} and {depths[place + 1]:.2f} mm along its axis")
    volumes = [[places[d][n] for d in places] for n in range(counts.pop())]
    first, last = volumes[0][0].position, volumes[0][-1].position
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along * column_step, down * row_step
    affine[:3, 2] = (last - first) / (len(depths) - 1)
    affine[:3, 3] = first
    notes = []
    if np.linalg.norm(np.cross(affine[:3, 2], normal)) > 0.01 * step:
        notes.append("the slices are shifted against each other (gantry tilt): the affine is sheared")
    return volumes, affine, notes


@contextlib.contextmanager
def open_series(series: Series, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open a series; of several volumes at the same positions one is chosen by `options.volume`.

    Raises:
        InputError: if slices are missing, or images cannot be decoded.
    """
    try:
        volumes, affine, notes = _stack(series)
    except InputError as error:
        raise InputError(f"{name}: series {_label(series)} {error}.") from None
    sitk = need("SimpleITK", EXTRA, name)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    rows, columns = series.slices[0].grid[:2]
    shape = (columns, rows, len(volumes[0]))
    count = (len(volumes),) if len(volumes) > 1 else ()
    slices = volumes[pick(name, (*shape, *count), options.volume, notes)]
    frames: dict[Path, np.ndarray] = {}  # of the file read last, where one holds several

    def load(path: Path, syntax: str) -> np.ndarray:
        if path not in frames:
            frames.clear()
            try:
                frames[path] = sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32))
            except RuntimeError as error:
                raise InputError(
                    f"{name}: {path.name} cannot be decoded (transfer syntax {syntax}: {one_line(error)}); "
                    "copy it again, or decompress it with gdcmconv --raw."
                ) from error
        return frames[path]

    def read(start: int, stop: int) -> np.ndarray:
        planes = np.empty((stop - start, rows, columns), np.float32)
        for place, part in enumerate(slices[start:stop]):
            array = load(part.path, part.syntax)
            if array.shape[-2:] != (rows, columns) or part.frame >= (len(array) if array.ndim == 3 else 1):
                raise InputError(
                    f"{name}: {part.path.name} holds fewer voxels than its header promises; copy it again."
                )
            planes[place] = array[part.frame] if array.ndim == 3 else array
        return planes

    yield VolumeFile(name, shape, np.float32, LPS_TO_RAS @ affine, read, notes=notes)
