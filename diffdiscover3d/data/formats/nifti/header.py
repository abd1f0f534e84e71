"""Validation of NIfTI headers before any data are read: path, shape, size and affine."""

import errno
import logging
import math
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.data.formats.units import IN_MM
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.memory import check_memory

SUFFIXES = (".nii.gz", ".nii")
DANGLING = "a link to a file that is not there"
_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_DEFLATE_LIMIT = 1032  # maximum compression ratio of deflate; headers that imply more are invalid
_MOST_EXTENSIONS = 2**27  # bytes between header and data; limits the time to skip them in a crafted .gz


def parse_header(path: Path, block: bytes) -> nib.Nifti1Header:
    """Parse and validate the header of a file.

    Args:
        path: path of the file, for error messages.
        block: the first 540 uncompressed bytes of the file.

    Raises:
        InputError: if the header is damaged or is not that of a single-file NIfTI.
    """
    size = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    image_class = nib.Nifti1Image if 348 in size else nib.Nifti2Image if 540 in size else None
    if image_class is None:
        raise InputError(f"{path}: no NIfTI header; convert the scan, for example with dcm2niix.")
    header_class = image_class.header_class
    length = header_class.template_dtype.itemsize
    if len(block) < length:
        raise InputError(f"{path}: truncated inside its header; copy it again.")
    try:
        with _quiet_nibabel():
            header = header_class(block[:length])
    except Exception as error:  # nibabel's header checks raise various exceptions
        raise InputError(f"{path}: damaged NIfTI header ({error}); convert or copy the scan again.") from error
    if header["magic"].item().rstrip(b"\0") not in (b"n+1", b"n+2"):
        raise InputError(f"{path}: not a single-file NIfTI (magic {header['magic'].item()!r}); convert it to .nii.")
    return header


def check_reachable(path: Path) -> None:
    """Check that a path can be looked up, and is no named pipe, socket or device, which would be waited for.

    Missing files are not an error here.

    Raises:
        InputError: if a path component is too long, a folder is not searchable, the disk cannot be read, or it is
            neither a file nor a folder.
    """
    try:
        if kind := special_kind(path):
            raise InputError(f"{path}: is {kind}, not a file; copy its content to a file.")
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL character in a name
        pass
    except OSError as error:
        remedy = "shorten it" if error.errno == errno.ENAMETOOLONG else "check its folders' permissions and the disk"
        raise InputError(f"{str(path)[:200]}: cannot be reached ({error.strerror}); {remedy}.") from error


def special_kind(path: Path) -> str | None:
    """What a path is that is neither a file nor a folder, `None` for these.

    Raises:
        OSError: if it cannot be looked up.
    """
    mode = path.stat().st_mode
    return next((name for test, name in _SPECIAL if test(mode)), None)


def check_there(path: Path) -> None:
    """As [`check_reachable`]; a missing file is an error.

    Raises:
        InputError: also if there is nothing, or a link without its target.
    """
    check_reachable(path)
    if path.exists():
        return
    if path.is_symlink():
        raise InputError(f"{path}: {DANGLING}; fetch the content (`git annex get`, `hf download`) or mend the link.")
    raise InputError(f"{path}: no such file.")


def check_shape(path: Path, header) -> tuple[int, ...]:
    """Validate and return the shape: at least three axes of two or more voxels, with real values."""
    shape = tuple(int(n) for n in header.get_data_shape())
    if any(n < 1 for n in shape) or not shape:
        raise InputError(f"{path}: its header contains the invalid shape {shape}; convert or copy the scan again.")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"{path}: not a 3D volume (shape {shape}); give a scan of at least two slices.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = "RGB" if dtype.fields else "complex" if dtype.kind == "c" else str(dtype)
        raise InputError(f"{path}: contains {kind} voxels; convert them to one real number per voxel.")
    return shape


def check_size(path: Path, header, shape: tuple[int, ...]) -> None:
    """Check, before allocating memory, that the file is large enough for the shape in its header."""
    offset = float(header["vox_offset"])
    length = header.template_dtype.itemsize
    if not length <= offset <= _MOST_EXTENSIONS:
        raise InputError(f"{path}: its header has the invalid data offset {offset:g}; convert or copy the scan again.")
    needed = int(np.prod([float(n) for n in shape])) * header.get_data_dtype().itemsize + int(offset)
    on_disk = path.stat().st_size
    can_hold = on_disk * _DEFLATE_LIMIT if path.name.lower().endswith(".gz") else on_disk
    if needed > can_hold:
        raise InputError(
            f"{path}: truncated, its header requires {needed:,} bytes for shape {shape} and the file contains "
            f"at most {can_hold:,}; copy it again."
        )


def check_fits(path: Path, header, shape: tuple[int, ...]) -> None:
    """Check that a volume fits into this machine's memory."""
    check_memory(path, shape, reading_bytes(header, shape))


def length_unit(header) -> str:
    """The unit of lengths, a key of `IN_MM`; mm where the header gives none."""
    return {1: "m", 3: "um"}.get(int(header["xyzt_units"]) & 7, "mm")


def read_affine(path: Path, header, ignore: bool, notes: list[str]) -> np.ndarray:
    """Read the (4, 4) affine in mm.

    Args:
        path: path of the file, for error messages.
        header: header of the file.
        ignore: use the axes as stored if the affine is unusable, instead of raising.
        notes: list to which warnings about the affine are appended.
    """
    try:
        with _quiet_nibabel():
            affine = np.array(header.get_best_affine(), dtype=float)
            qform = header.get_qform() if header["qform_code"] > 0 else None
        scale = IN_MM[length_unit(header)]
    except Exception as error:  # an invalid quaternion raises ValueError or HeaderDataError
        if not ignore:
            raise InputError(f"{path}: invalid quaternion ({error}); use --ignore-affine to ignore it.") from error
        affine, qform, scale = np.full((4, 4), np.nan), None, 1.0
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    usable = np.isfinite(affine).all() and (lengths > 0).all()
    usable = usable and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-4
    if not usable:
        if not ignore:
            raise InputError(
                f"{path}: its affine is zero, NaN or not invertible; use --ignore-affine to use the voxel grid alone."
            )
        notes.append("the affine is unusable and was ignored: axes are taken as stored")
        zooms = np.abs(np.asarray(header.get_zooms()[:3], dtype=float))
        return np.diag([*np.where(np.isfinite(zooms) & (zooms > 0), zooms * IN_MM[length_unit(header)], 1.0), 1.0])

    directions = affine[:3, :3] / lengths
    if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-2:
        notes.append("the affine is sheared")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        notes.append("neither sform nor qform is set: orientation is assumed from the voxel sizes")
    if qform is not None and header["sform_code"] > 0:
        # measured in voxels, so that a distant origin does not hide a difference in voxel size
        edges = np.linalg.norm(qform[:3, :3] - affine[:3, :3], axis=0) / lengths
        shift = np.linalg.norm(np.linalg.solve(affine[:3, :3], qform[:3, 3] - affine[:3, 3]))
        if not (edges.max() <= 0.01 and shift <= 0.1):  # also true for NaN
            notes.append("sform and qform disagree by more than 1 % or a tenth of a voxel: the sform is used")
    affine[:3] *= scale
    return affine


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Silence nibabel's log of header corrections; this module adds its own notes."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def reading_bytes(header, shape: Sequence[int]) -> float:
    """Peak memory of reading a NIfTI file, in bytes: the data as stored and two float32 copies of one volume."""
    stored = math.prod(map(float, shape)) * header.get_data_dtype().itemsize
    return stored + 8 * math.prod(map(float, shape[:3]))
