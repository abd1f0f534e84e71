"""What a NIfTI header must say before a byte of data is read: place, shape, size, affine."""

import errno
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.data.formats.nifti.payload import open_payload
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.memory import check_memory

SUFFIXES = (".nii.gz", ".nii")
_DEFLATE_LIMIT = 1032  # deflate cannot expand a byte into more, so a header asking for more is lying
_MOST_EXTENSIONS = 2**27  # bytes between header and data; to skip more in a crafted .gz would take its time


def read_header(path: Path) -> nib.Nifti1Header:
    """The checked header of a `.nii` or `.nii.gz` file (NIfTI-1 or NIfTI-2).

    Raises:
        InputError: if the file is missing, empty, something else than its name says, or its header is damaged.
    """
    check_reachable(path)
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a .nii or .nii.gz file.")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: not a NIfTI file name; it must end in .nii or .nii.gz.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if not start:
            raise InputError(f"{path}: the file is empty; copy it again.")
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`.")
        zipped = start.startswith(b"\x1f\x8b")
        if path.name.endswith(".gz") and not zipped:
            web_page = start.lstrip()[:1] == b"<"
            hint = "it looks like a web page: download it again" if web_page else "rename it to .nii if it is one"
            raise InputError(f"{path}: named .gz but not gzip-compressed; {hint}.")
        if zipped and not path.name.endswith(".gz"):
            raise InputError(f"{path}: gzip-compressed but not named .gz; rename it to {path.name}.gz.")
        with open_payload(path) as file:
            block = file.read(540)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({error}); copy it again.") from error

    size = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    image_class = nib.Nifti1Image if 348 in size else nib.Nifti2Image if 540 in size else None
    if image_class is None:
        raise InputError(f"{path}: no NIfTI header in it; convert the scan, for example with dcm2niix.")
    header_class = image_class.header_class
    length = header_class.template_dtype.itemsize
    if len(block) < length:
        raise InputError(f"{path}: truncated inside its header; copy it again.")
    try:
        with _quiet_nibabel():
            header = header_class(block[:length])
    except Exception as error:  # nibabel's header checks raise many kinds
        raise InputError(f"{path}: damaged NIfTI header ({error}); convert or copy the scan again.") from error
    if header["magic"].item().rstrip(b"\0") not in (b"n+1", b"n+2"):
        raise InputError(f"{path}: not a single-file NIfTI (magic {header['magic'].item()!r}); convert it to .nii.")
    return header


def check_reachable(path: Path) -> None:
    """Refuse a path that the file system will not even look up; one where nothing lies is no matter here.

    Raises:
        InputError: if a name in it is too long, a folder on the way may not be searched, or reading the disk fails.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a ValueError is what a NUL in a name gives
        pass
    except OSError as error:
        remedy = "shorten it" if error.errno == errno.ENAMETOOLONG else "check its folders' permissions and the disk"
        raise InputError(f"{str(path)[:200]}: cannot be reached ({error.strerror}); {remedy}.") from error


def check_shape(path: Path, header) -> tuple[int, ...]:
    """The shape, if it is that of a volume of real numbers with at least two voxels along each axis."""
    shape = tuple(int(n) for n in header.get_data_shape())
    if any(n < 1 for n in shape) or not shape:
        raise InputError(f"{path}: its header gives the impossible shape {shape}; convert or copy the scan again.")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"{path}: not a 3D volume but of shape {shape}; give a scan of at least two slices.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = "RGB" if dtype.fields else "complex" if dtype.kind == "c" else str(dtype)
        raise InputError(f"{path}: holds {kind} voxels; convert it to one real number a voxel.")
    return shape


def check_size(path: Path, header, shape: tuple[int, ...]) -> None:
    """Compare what the header promises with what the file can hold, before allocating."""
    offset = float(header["vox_offset"])
    length = header.template_dtype.itemsize
    if not length <= offset <= _MOST_EXTENSIONS:
        raise InputError(f"{path}: its header puts the data at byte {offset:g}; convert or copy the scan again.")
    needed = int(np.prod([float(n) for n in shape])) * header.get_data_dtype().itemsize + int(offset)
    on_disk = path.stat().st_size
    can_hold = on_disk * _DEFLATE_LIMIT if path.name.endswith(".gz") else on_disk
    if needed > can_hold:
        raise InputError(
            f"{path}: truncated, its header promises {needed:,} bytes for shape {shape} and the file can hold "
            f"at most {can_hold:,}; copy it again."
        )


def check_fits(path: Path, header, shape: tuple[int, ...]) -> None:
    """Refuse a volume that cannot be read whole into this machine's memory."""
    check_memory(path, shape, reading_bytes(header, shape))


def read_affine(path: Path, header, ignore: bool, notes: list[str]) -> np.ndarray:
    """The (4, 4) affine in mm; what is unusual about it is added to `notes`.

    Args:
        ignore: where the affine is unusable, take the axes as stored instead of raising.
    """
    try:
        with _quiet_nibabel():
            affine = np.array(header.get_best_affine(), dtype=float)
            qform = header.get_qform() if header["qform_code"] > 0 else None
    except Exception as error:  # an impossible quaternion raises ValueError or HeaderDataError
        if not ignore:
            raise InputError(f"{path}: bad quaternion in its header ({error}); --ignore-affine goes on.") from error
        affine, qform = np.full((4, 4), np.nan), None
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    usable = np.isfinite(affine).all() and (lengths > 0).all()
    usable = usable and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-4
    if not usable:
        if not ignore:
            raise InputError(
                f"{path}: its affine is zero, NaN or not invertible, so its place in space is unknown; "
                "--ignore-affine goes on with the voxel grid alone."
            )
        notes.append("the affine is unusable and was ignored: axes are taken as stored")
        zooms = np.abs(np.asarray(header.get_zooms()[:3], dtype=float))
        return np.diag([*np.where(np.isfinite(zooms) & (zooms > 0), zooms, 1.0), 1.0])

    directions = affine[:3, :3] / lengths
    if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-2:
        notes.append("the affine is sheared")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        notes.append("neither sform nor qform is set: orientation is assumed from the voxel sizes")
    if qform is not None and header["sform_code"] > 0:
        # in voxels: the origin may lie hundreds of mm away, and must not hide voxels of another size
        edges = np.linalg.norm(qform[:3, :3] - affine[:3, :3], axis=0) / lengths
        shift = np.linalg.norm(np.linalg.solve(affine[:3, :3], qform[:3, 3] - affine[:3, 3]))
        if not (edges.max() <= 0.01 and shift <= 0.1):  # NaN is no agreement
            notes.append("sform and qform disagree by more than 1 % or a tenth of a voxel: the sform is used")
    return affine


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """nibabel logs what it mends in a header; what matters of it is said by this module's own notes."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def reading_bytes(header, shape: Sequence[int]) -> float:
    """The most that reading a NIfTI file takes: its data as stored, beside two float32 copies of one volume."""
    stored = math.prod(map(float, shape)) * header.get_data_dtype().itemsize
    return stored + 8 * math.prod(map(float, shape[:3]))
