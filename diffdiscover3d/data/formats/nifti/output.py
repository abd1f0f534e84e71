"""Writing NIfTI piece by piece: the header of a result, then its voxels in the order in which they are stored."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.utils.files import atomic_file

_LABEL_INTENT = 1002


def output_header(source: nib.Nifti1Header, dtype: np.dtype, shape: Sequence[int], labels: bool) -> nib.Nifti1Header:
    """The header of a result that lies on the grid of a file: its affine and codes bit for bit, but no extensions.

    Args:
        source: the file's header.
        dtype: of the result's voxels; they are stored in the byte order of `source`.
        shape: of the result, on the file's own axes.
        labels: mark it as a label map (intent LABEL).
    """
    header = source.copy()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    if len(shape) == 3:
        header["pixdim"] = source["pixdim"]  # setting the shape touches the unused ones
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = 0  # the library puts its own
    header.extensions.clear()
    header.set_slope_inter(1, 0)
    header.set_intent(_LABEL_INTENT if labels else 0, name="parts" if labels else "", allow_unknown=True)
    header["descrip"] = b"diffdiscover3d"
    header["magic"] = header.single_magic
    return header


@contextmanager
def nifti_stream(path: str | Path, header: nib.Nifti1Header) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a file atomically: yields a function that takes its voxels in pieces, first axis fastest.

    Args:
        path: target ending in `.nii` or `.nii.gz`; the same bytes every time, however the voxels are divided.
        header: as [`output_header`] makes it.

    Raises:
        OutputError: if it cannot be written.
    """
    path, dtype = Path(path), header.get_data_dtype()
    # as gzip.compress, which stores neither name nor time
    packer = zlib.compressobj(6, zlib.DEFLATED, 31) if path.name.endswith(".gz") else None
    start = BytesIO()
    header.write_to(start)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:

        def write(values: np.ndarray) -> None:
            payload = values.astype(dtype, copy=False).tobytes(order="F")
            file.write(packer.compress(payload) if packer else payload)

        file.write(packer.compress(start.getvalue()) if packer else start.getvalue())
        yield write
        if packer:
            file.write(packer.flush())
        file.flush()
