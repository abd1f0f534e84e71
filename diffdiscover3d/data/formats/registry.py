"""Which format a file or folder has, by its name and its first bytes, and the functions that read any of them.

A volume is named by a path. Where a path holds several, `::` and a name follow: `cells.h5::/raw`, `arrays.npz::image`,
`store.zarr::plate/A/1`, and the Series Instance UID behind a DICOM folder. `@volume=1` and `@resolution=2` at the end
of these choose a channel or time point and a resolution of a pyramid: `cells.ome.tif::@volume=1`.
"""

import contextlib
import glob
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from diffdiscover3d.data.formats import (
    analyze,
    dicom,
    freesurfer,
    hdf5,
    minc,
    mrc,
    numpy_array,
    ome_zarr,
    sitk,
    tiff,
)
from diffdiscover3d.data.formats.nifti.header import SUFFIXES as NIFTI_SUFFIXES
from diffdiscover3d.data.formats.nifti.header import check_there
from diffdiscover3d.data.formats.stamps import StampedFiles, files_sha256
from diffdiscover3d.data.formats.units import parse_voxel_size
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.terminal import printable

SEPARATOR = "::"
# all but NIfTI, which has a reader of its own
FORMATS: tuple[ModuleType, ...] = (
    dicom,
    sitk,
    freesurfer,
    minc,
    analyze,
    mrc,
    tiff,
    hdf5,
    numpy_array,
    ome_zarr,
)
LABEL_SUFFIXES = tuple(f.LABEL_SUFFIX for f in FORMATS if hasattr(f, "LABEL_SUFFIX"))
_START = 352  # bytes of a file in which every format shows
NAMES = "NIfTI, DICOM, NRRD, MetaImage, MGH, MINC, Analyze, MRC, TIFF, OME-Zarr, HDF5 or NumPy"


def split(path: str | Path) -> tuple[Path, str | None]:
    """The file or folder of a volume, and its name in it.

    >>> split("cells.h5::/raw")[1], split("scan.nii.gz")[1]
    ('/raw', None)
    """
    place, _, inner = str(path).partition(SEPARATOR)
    return Path(place), inner.partition("@")[0] or None


def options_in(path: str | Path) -> dict[str, int]:
    """The options at the end of a path.

    Raises:
        InputError: if they are unknown, or no numbers.

    >>> options_in("cells.ome.tif::@volume=1"), options_in("scan@home.nii.gz")
    ({'volume': 1}, {})
    """
    text = str(path).partition(SEPARATOR)[2].partition("@")[2]
    found = {}
    for part in filter(None, text.split("@")):
        name, _, value = part.partition("=")
        if name not in ("volume", "resolution") or not value.isdigit():
            raise InputError(f"{path}: behind @ stand volume=N and resolution=N, not {part}.")
        found[name] = int(value)
    return found


def with_options(path: str | Path, **options: int | None) -> Path:
    """A path with options at its end; those that are `None` are left out.

    >>> str(with_options("cells.ome.tif", volume=1))
    'cells.ome.tif::@volume=1'
    """
    text = "".join(f"@{name}={value}" for name, value in options.items() if value is not None)
    return Path(f"{path}{'' if SEPARATOR in str(path) or not text else SEPARATOR}{text}")


def is_nifti(path: str | Path) -> bool:
    """Whether a name is that of a NIfTI file, `.nii` or `.nii.gz` in letters of any case."""
    return Path(path).name.lower().endswith(NIFTI_SUFFIXES)


def path_is_nifti(path: str | Path) -> bool:
    """Whether a path is to be read as NIfTI: by its name, also if nothing is there, or if it is a folder."""
    place, inner = split(path)
    return inner is None and is_nifti(place)


def format_by_name(path: str | Path) -> ModuleType | None:
    """The format that the ending of a file's name belongs to, `None` for NIfTI and others."""
    name = split(path)[0].name.lower()
    return next((f for f in FORMATS if name.endswith(f.SUFFIXES)), None)


def recognise(path: str | Path) -> ModuleType | None:
    """The format of a file or folder, by its name or first bytes; `None` for NIfTI and what is no volume."""
    place, _ = split(path)
    if place.is_dir():
        if ome_zarr.is_store(place):
            return ome_zarr
        return dicom if _dicom_files(place) else None
    if is_nifti(place):
        return None
    named = format_by_name(place)
    if named is not None or not place.is_file():
        return named
    start = _first_bytes(place)
    return next((f for f in FORMATS if hasattr(f, "matches") and f.matches(start)), None)


def is_volume(path: str | Path) -> bool:
    """Whether a path names one volume (or a DICOM folder), rather than a folder, glob or list of them."""
    place, inner = split(path)
    return inner is not None or is_nifti(place) or recognise(place) is not None


def stem(path: str | Path) -> str:
    """The name of a volume without its ending, as its results begin with it."""
    place, inner = split(path)
    suffixes = [s for f in FORMATS for s in f.SUFFIXES] + list(NIFTI_SUFFIXES)
    found = [s for s in suffixes if place.name.lower().endswith(s)]
    name = place.name or place.resolve().name
    if found:
        name = name[: -len(max(found, key=len))]
    elif place.suffix and not place.is_dir():
        name = place.stem
    inside = _inner_name(place, inner).replace("/", " ").split() if inner else []
    return "_".join([name, *inside, *(f"{key}-{value}" for key, value in options_in(path).items())])


def display_name(path: str | Path) -> str:
    """The name of a volume for people and sidecars: without its folder, and a DICOM series by its number."""
    place, inner = split(path)
    name = place.name or place.resolve().name
    shown = name if inner is None else f"{name}{SEPARATOR}{_inner_name(place, inner)}"
    return printable(with_options(shown, **options_in(path)))


def _inner_name(place: Path, inner: str) -> str:
    if not place.is_dir() or ome_zarr.is_store(place):
        return inner
    # a UID is long and identifies a patient's study; the number is enough to distinguish series
    number = next((s.number for s in series_in(place) if s.uid == inner), None)
    return f"series-{number if number is not None else inner.rsplit('.', 1)[-1]}"


def label_suffix(path: str | Path) -> str:
    """The ending of the label maps of a volume: that of its own format family, or of NIfTI for medical formats."""
    found = recognise(path)
    return getattr(found, "LABEL_SUFFIX", ".nii.gz")


def folder_of(path: str | Path) -> Path:
    """The folder beside which results of a volume are written by default."""
    return split(path)[0].parent


def files_of(path: str | Path) -> list[Path]:
    """The files that a volume is stored in, sorted."""
    place, inner = split(path)
    found = recognise(place)
    if found is ome_zarr and place.is_dir():
        return sorted(p for p in place.rglob("*") if p.is_file())
    if found is not dicom and not place.is_dir():
        name = place.name.lower()
        pair = []
        if name.endswith(analyze.SUFFIXES) or name.endswith((".mhd", ".nhdr")):
            base = place.name.removesuffix(".gz").rsplit(".", 1)[0]
            pair = [
                p
                for p in place.parent.glob(f"{glob.escape(base)}.*")
                if p.suffix in (".img", ".hdr", ".raw", ".zraw", ".gz")
            ]
        return sorted({place, *pair})
    return sorted({s.path for s in _choose_series(place, inner, str(place)).slices})


def _choose_series(place: Path, wanted: str | None, name: str) -> dicom.Series:
    """The DICOM series of a folder; of a single file the series to which it belongs."""
    if place.is_file():
        only, left_out = dicom.list_series([place], name)
        if not only:
            raise InputError(f"{name}: is {next(iter(left_out.values()))}; give a series of images.")
        if len(only[0].slices) > 1:  # an enhanced file holds all of them
            return dicom.choose_series(only, only[0].uid, name)
        wanted, place = only[0].uid, place.parent
    return dicom.choose_series(series_in(place), wanted, name)


def volume_sha256(path: str | Path) -> str:
    """The sha256 of a volume's file; of several files, that over their sha256 in the order of their names.

    Args:
        path: as for [`files_of`].
    """
    return files_sha256(split(path)[0], files_of(path))


@contextlib.contextmanager
def open_volume(path: str | Path, options: ReadOptions | None = None) -> Iterator[VolumeFile]:
    """Open a volume of any format but NIfTI.

    Args:
        path: as this module describes it.
        options: for unusual files.

    Raises:
        InputError: if it is missing, damaged, no volume, or needs a library that is not installed.
    """
    options = replace(options or ReadOptions(), **options_in(path))
    place, inner = split(path)
    name = str(path)
    check_there(place)
    found = recognise(place)
    if place.is_file():
        _check_start(place, found)
    if found is None:
        what = "a folder without DICOM images" if place.is_dir() else "no volume of a known format"
        raise InputError(f"{name}: is {what}; give a {NAMES} file.")
    if inner is not None and found not in (dicom, hdf5, numpy_array, ome_zarr):
        raise InputError(f"{name}: a {found.NAME} file holds nothing that is named behind {SEPARATOR}.")
    with contextlib.ExitStack() as stack:
        stamped = None if found is dicom else StampedFiles(place, lambda: files_of(place))
        if found is dicom:
            wanted = inner or options.series
            files = sorted({s.path for s in _choose_series(place, wanted, name).slices})
            stamped = StampedFiles(place, lambda: files)
            # listed again, so that headers that were read before the stamps count only if they have not changed
            volume = stack.enter_context(dicom.open_series(_choose_series(place, wanted, name), name, options))
        elif inner is not None:
            volume = stack.enter_context(found.open_file(place, name, options, inner))
        else:
            volume = stack.enter_context(found.open_file(place, name, options))
        volume.files = stamped
        if options.voxel_size is not None:
            volume = volume.with_spacing(*parse_voxel_size(options.voxel_size))
        yield volume


def series_in(folder: Path) -> list[dicom.Series]:
    """The DICOM series in a folder and those below it.

    Raises:
        InputError: if `pydicom` is missing.
    """
    return dicom_in(folder)[0]


def dicom_in(folder: Path) -> tuple[list[dicom.Series], dict[Path, str]]:
    """The same, with the DICOM files that belong to no series and the reasons."""
    files = _dicom_files(folder)
    return _dicom_in(str(folder), tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@lru_cache(maxsize=16)
def _dicom_in(folder: str, files: tuple[tuple[str, int, int], ...]):
    return dicom.list_series([Path(f) for f, _, _ in files], folder)


def _dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder and those below it, by their first bytes; hidden ones and DICOMDIR are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.name == "DICOMDIR":
            continue
        named = path.suffix.lower() in dicom.SUFFIXES
        if not named and (is_nifti(path) or format_by_name(path) is not None or ".zarr" in str(path)):
            continue
        if path.is_file() and dicom.matches(_first_bytes(path)):
            found.append(path)
    return found


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_START)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from error


def _check_start(path: Path, found: ModuleType | None) -> None:
    """Refuse a file whose first bytes do not fit the format of its name."""
    start = _first_bytes(path)
    if not start:
        raise InputError(f"{path}: the file is empty; copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`.")
    if found is None or not hasattr(found, "matches") or path.name.lower().endswith((".gz", ".npz")):
        return
    if not found.matches(start):
        web_page = start.lstrip()[:1] == b"<"
        hint = "it looks like a web page: download it again" if web_page else "copy or convert it again"
        raise InputError(f"{path}: is no {found.NAME} file, whatever its name is; {hint}.")
