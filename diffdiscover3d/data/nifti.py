"""Read NIfTI volumes into canonical orientation, and write results back on the input's own grid."""

import gzip
import io
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from diffdiscover3d.errors import InputError, MemoryLimitError
from diffdiscover3d.files import atomic_file

SUFFIXES = (".nii.gz", ".nii")
_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)
_DEFLATE_LIMIT = 1032  # deflate cannot expand a byte into more, so a header asking for more is lying
_LABEL_INTENT = 1002


@dataclass(frozen=True)
class NiftiVolume:
    """A volume in canonical (RAS+) orientation that remembers the grid it came from.

    Attributes:
        data: (H, W, D) float32 intensities, finite, along right, anterior, superior.
        affine: (4, 4) from voxels of `data` to millimetres.
        header: the file's header, unchanged.
        orientation: of the file's axes, as `nibabel.orientations.io_orientation` gives it.
        notes: what was unusual about the file, in words for the user.
    """

    data: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header
    orientation: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel of `data`, in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def to_input_grid(self, array: np.ndarray) -> np.ndarray:
        """Turn an (H, W, D, ...) array on the grid of `data` into the file's own axis order and directions."""
        return apply_orientation(array, ornt_transform(_CANONICAL, self.orientation))


def read_nifti(
    path: str | Path,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
) -> NiftiVolume:
    """Read a `.nii` or `.nii.gz` file whole, after checking its header.

    Args:
        path: the file (NIfTI-1 or NIfTI-2, any data type of real numbers, either byte order).
        volume: which volume of a 4-D or 5-D file, from 0; a single one needs no choice.
        nan_to_zero: put 0 for NaN and Inf instead of refusing them.
        ignore_affine: go on with the voxel grid alone where the affine is unusable.

    Raises:
        InputError: if the file is missing, damaged, not a 3D volume of real numbers, or has no contrast.
        MemoryLimitError: if the volume is larger than this machine's memory.
    """
    path = Path(path)
    notes: list[str] = []
    image_class, header = _read_header(path)
    shape = _check_shape(path, header)
    _check_size(path, header, shape)
    affine = _read_affine(path, header, ignore_affine, notes)
    data = _read_data(path, image_class, header, notes)
    data = _pick_volume(path, data, shape, volume, notes)
    data = _to_finite_float32(path, data, nan_to_zero, notes)
    low, high = float(data.min()), float(data.max())
    if high - low > float(np.finfo(np.float32).max):  # normalising would divide by Inf
        raise InputError(f"{path}: its values, {low:g} to {high:g}, are too far apart; rescale it.")
    if low == high:
        raise InputError(f"{path}: no contrast, all voxels are {low:g}; give a scan with structure in it.")

    orientation = io_orientation(affine)
    canonical_affine = affine @ inv_ornt_aff(orientation, data.shape)
    data = np.ascontiguousarray(apply_orientation(data, orientation))
    return NiftiVolume(data, canonical_affine, header, orientation, tuple(notes))


def write_like(path: str | Path, array: np.ndarray, like: NiftiVolume, *, labels: bool = False) -> None:
    """Write an array lying on the grid of `like.data` as NIfTI, on the grid, affine and codes of its file.

    Args:
        path: target ending in `.nii` or `.nii.gz`; written atomically, the same bytes every time.
        array: (H, W, D) or (H, W, D, C).
        labels: mark it as a label map (intent LABEL).

    Raises:
        OutputError: if it cannot be written.
    """
    header = like.header.copy()
    array = like.to_input_grid(array)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    if array.ndim == 3:
        header["pixdim"] = like.header["pixdim"]  # setting the shape touches the unused ones
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = 0  # the library puts its own; extensions of the input are not carried over
    header.extensions.clear()
    header.set_slope_inter(1, 0)
    header.set_intent(_LABEL_INTENT if labels else 0, name="parts" if labels else "", allow_unknown=True)
    header["descrip"] = b"diffdiscover3d"
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # an affine of None leaves the header's own sform, qform and codes as they are, bit for bit
    payload = image_class(array, None, header).to_bytes()
    path = Path(path)
    if path.name.endswith(".gz"):
        payload = gzip.compress(payload, compresslevel=6, mtime=0)
    with atomic_file(path) as temporary:
        temporary.write_bytes(payload)


def write_volume(
    path: str | Path, array: np.ndarray, affine: np.ndarray | None = None, *, labels: bool = False
) -> None:
    """Write a new (H, W, D) volume or label map with the given affine (default: 1 mm, RAS)."""
    affine = np.eye(4) if affine is None else affine
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
    header.set_xyzt_units("mm")
    write_like(path, array, NiftiVolume(array, affine, header, io_orientation(affine)), labels=labels)


def as_volume_tensor(volume) -> torch.Tensor:
    """Bring whatever a user has to a (B, 1, H, W, D) float32 tensor of raw intensities.

    Args:
        volume: a path or nibabel image (brought to canonical orientation), a [`NiftiVolume`], or an array or tensor
            of shape (H, W, D), (B, H, W, D) or (B, 1, H, W, D).

    Raises:
        InputError: if the file cannot be read, or the array is not of such a shape.
    """
    if isinstance(volume, str | os.PathLike):
        volume = read_nifti(volume)
    if isinstance(volume, nib.spatialimages.SpatialImage):
        if volume.get_data_dtype().kind == "c":  # asking nibabel for float32 would drop the imaginary part
            raise InputError("the image must hold real numbers, got complex ones; take their magnitude.")
        image = nib.as_closest_canonical(volume)
        volume = np.asarray(image.dataobj, dtype=np.float32)
        volume = (
            volume.reshape(volume.shape[:3]) if volume.ndim > 3 and volume.size == np.prod(volume.shape[:3]) else volume
        )
        if volume.ndim != 3:
            raise InputError(
                f"the image must hold one 3D volume, got shape {volume.shape}; pick one, as image.slicer[..., 0]."
            )
    if isinstance(volume, NiftiVolume):
        volume = volume.data
    if isinstance(volume, np.ndarray):  # torch takes neither negative strides nor the other byte order
        volume = np.ascontiguousarray(volume, dtype=volume.dtype.newbyteorder("="))
    tensor = torch.as_tensor(volume)
    if tensor.is_complex():
        raise InputError("the volume must hold real numbers, got complex ones; take their magnitude.")
    if tensor.ndim == 3:
        tensor = tensor[None, None]
    elif tensor.ndim == 4:
        tensor = tensor[:, None]
    if tensor.ndim != 5 or tensor.shape[1] != 1 or 0 in tensor.shape:
        raise InputError(
            f"a volume must be (H, W, D), (B, H, W, D) or (B, 1, H, W, D), got shape {tuple(tensor.shape)}."
        )
    return tensor.float()


def _read_header(path: Path) -> tuple[type[nib.Nifti1Image], nib.Nifti1Header]:
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
        with _open(path) as file:
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
    return image_class, header


def _check_shape(path: Path, header) -> tuple[int, ...]:
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


def _check_size(path: Path, header, shape: tuple[int, ...]) -> None:
    """Compare what the header promises with what the file can hold and memory can take, before allocating."""
    offset = float(header["vox_offset"])
    length = header.template_dtype.itemsize
    if not length <= offset < 2**40:
        raise InputError(f"{path}: its header puts the data at byte {offset:g}; convert or copy the scan again.")
    needed = int(np.prod([float(n) for n in shape])) * header.get_data_dtype().itemsize + int(offset)
    on_disk = path.stat().st_size
    can_hold = on_disk * _DEFLATE_LIMIT if path.name.endswith(".gz") else on_disk
    if needed > can_hold:
        raise InputError(
            f"{path}: truncated, its header promises {needed:,} bytes for shape {shape} and the file can hold "
            f"at most {can_hold:,}; copy it again."
        )
    import psutil

    free = psutil.virtual_memory().available
    if needed + 8 * float(np.prod([float(n) for n in shape])) > free:
        raise MemoryLimitError(
            f"{path}: a volume of shape {shape} needs more than the {free / 2**30:.1f} GiB of free memory; "
            "resample it or use a larger machine."
        )


def _read_affine(path: Path, header, ignore: bool, notes: list[str]) -> np.ndarray:
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
        scale = np.abs(affine[:3]).max()
        if not np.allclose(qform[:3], affine[:3], atol=0.01 * scale):
            notes.append("sform and qform disagree by more than 1 %: the sform is used")
    return affine


def _read_data(path: Path, image_class, header, notes: list[str]) -> np.ndarray:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0 or not np.isfinite(inter):
        notes.append(f"slope {slope:g} and intercept {inter:g} are no scaling: values are taken as stored")
        scaling = None
    else:
        scaling = (slope, inter)
    dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), int(header["vox_offset"])
    length = int(np.prod(shape)) * dtype.itemsize
    try:
        with _open(path) as file:
            file.seek(offset)
            payload = file.read(length)
            # reading on to the end makes gzip check its checksum; trailing bytes beyond 16 MiB are left alone
            file.read(2**24)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: its data is damaged ({error}); copy it again.") from error
    if len(payload) < length:
        raise InputError(f"{path}: truncated, {len(payload):,} of {length:,} bytes of data; copy it again.")
    data = np.frombuffer(payload, dtype=dtype).reshape(shape, order="F")
    if scaling and scaling != (1.0, 0.0):
        # NumPy scalars, not Python ones: float32 data is then scaled in float64 too, as nibabel does
        data = data * np.float64(scaling[0]) + np.float64(scaling[1])
    return data


def _pick_volume(path: Path, data: np.ndarray, shape: tuple[int, ...], volume: int | None, notes) -> np.ndarray:
    count = int(np.prod(shape[3:])) if len(shape) > 3 else 1
    if volume is not None and not 0 <= volume < count:
        raise InputError(f"{path}: has {count} volume(s), numbered from 0; there is no volume {volume}.")
    if count > 1 and volume is None:
        raise InputError(f"{path}: holds {count} volumes (shape {shape}); choose one with --volume N, from 0.")
    if len(shape) > 3:
        data = data.reshape(*shape[:3], count, order="F")[..., volume or 0]
        notes.append(f"volume {volume or 0} of {count} in a {len(shape)}-D file")
    return data


def _to_finite_float32(path: Path, data: np.ndarray, nan_to_zero: bool, notes: list[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        data = data.astype(np.float32)
    finite = np.isfinite(data)
    bad = data.size - int(np.count_nonzero(finite))
    if bad:
        if not nan_to_zero:
            raise InputError(f"{path}: {bad:,} of {data.size:,} voxels are NaN or Inf; --nan-to-zero goes on.")
        data = np.where(finite, data, np.float32(0))
        notes.append(f"{bad:,} NaN or Inf voxels were set to 0")
    return data


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


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
