"""Open NIfTI files whose header has been validated, for a single pass over the voxels."""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib

from diffdiscover3d.data.formats.nifti.header import (
    SUFFIXES,
    check_shape,
    check_size,
    check_there,
    parse_header,
    reading_bytes,
)
from diffdiscover3d.data.formats.nifti.payload import Payload, open_payload
from diffdiscover3d.errors import InputError

_HEADER_BYTES = 540  # header size of NIfTI-2, which exceeds that of NIfTI-1


@dataclass(frozen=True)
class NiftiFile:
    """An open file with a validated header; read its voxels with [`read_voxels`] or [`stream_volume`].

    Attributes:
        path: path of the file.
        header: the unmodified header.
        shape: (nx, ny, nz, ...) on the axes of the file.
        payload: bytes of the file, of which only the header has been read.
    """

    path: Path
    header: nib.Nifti1Header
    shape: tuple[int, ...]
    payload: Payload

    @property
    def reading_bytes(self) -> float:
        """Peak memory of [`read_voxels`], in bytes."""
        return reading_bytes(self.header, self.shape)


@contextmanager
def open_nifti(path: str | Path) -> Iterator[NiftiFile]:
    """Open a `.nii` or `.nii.gz` file (NIfTI-1 or NIfTI-2) and validate its header, shape and size.

    Raises:
        InputError: if the file is missing, empty, not a NIfTI file, not a 3D volume of real numbers, or shorter than
            declared by its header.
    """
    path = Path(path)
    check_there(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a .nii or .nii.gz file.")
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: not a NIfTI file name; it must end in .nii or .nii.gz.")
    with ExitStack() as stack:
        try:
            payload = stack.enter_context(open_payload(path))
            block = payload.peek(_HEADER_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be read ({error}); copy it again.") from error
        header = parse_header(path, block)
        shape = check_shape(path, header)
        check_size(path, header, shape)
        yield NiftiFile(path, header, shape, payload)
