"""Streaming NIfTI writer: the header of a result, followed by its voxels in storage order."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.utils.files import atomic_file

_LABEL_INTENT = 1002
_TEXT_FIELDS = ("data_type", "db_name", "aux_file", "descrip")


def output_header(source: nib.Nifti1Header, dtype: np.dtype, shape: Sequence[int], labels: bool) -> nib.Nifti1Header:
    """The header of a result on the grid of a file, with a bit-exact copy of its affine and codes, without extensions
    and free text.

    Args:
        source: header of the file.
        dtype: data type of the result; stored in the byte order of `source`.
        shape: shape of the result on the axes of the file.
        labels: mark the result as a label map (intent LABEL).
    """
    header = source.copy()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    if len(shape) == 3:
        header["pixdim"] = source["pixdim"]  # `set_data_shape` modifies unused entries
    header["cal_min"] = header["cal_max"] = 0
    header["vox_offset"] = 0  # set by nibabel on writing
    header.extensions.clear()
    header.set_slope_inter(1, 0)
    header.set_intent(_LABEL_INTENT if labels else 0, name="parts" if labels else "", allow_unknown=True)
    for field in _TEXT_FIELDS:  # may hold names, dates or paths
        if field in header.template_dtype.names:
            header[field] = b""
    header["descrip"] = b"diffdiscover3d"
    header["magic"] = header.single_magic
    return header


@contextmanager
def nifti_stream(path: str | Path, header: nib.Nifti1Header) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a file atomically. Yields a function that writes the next voxels, first axis fastest.

    Args:
        path: target path ending in `.nii` or `.nii.gz`. The bytes are reproducible and independent of the chunking.
        header: header from [`output_header`].

    Raises:
        OutputError: if the file cannot be written.
    """
    path, dtype = Path(path), header.get_data_dtype()
    # gzip format without file name and time stamp, as by gzip.compress
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
