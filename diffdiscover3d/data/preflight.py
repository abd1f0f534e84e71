"""Answer for a single bad file at once, before the seconds that importing torch takes."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.data.nifti import read_nifti
from diffdiscover3d.data.nifti_header import SUFFIXES, check_shape, check_size, read_header

_READ_WHOLE = 2**25  # bytes on disk up to which reading a file twice costs less than it saves
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")


def refuse_early(inputs: Sequence[str], device: str = "auto", **reading) -> None:
    """Raise what reading the one input would raise; several inputs, folders and lists are left to the command.

    A small file is read whole, of a large one the header: the command reads all of it again before any model.

    Args:
        device: an unknown one is a wrong use, and comes before anything about the file.
        reading: `volume`, `nan_to_zero`, `ignore_affine` of [`read_nifti`].

    Raises:
        InputError, MemoryLimitError: as [`read_nifti`].
    """
    if len(inputs) != 1 or not _DEVICE.fullmatch(device):
        return
    path = Path(inputs[0])
    if not path.name.endswith(SUFFIXES) or path.is_dir() or any(c in str(path) for c in "*?["):
        return
    if path.is_file() and path.stat().st_size > _READ_WHOLE:
        header = read_header(path)
        check_size(path, header, check_shape(path, header))
    else:
        read_nifti(path, **reading)
