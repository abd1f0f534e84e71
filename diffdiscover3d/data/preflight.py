"""What can be said about an input before anything is read whole, or the seconds that importing torch takes."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffdiscover3d.data.nifti import read_nifti
from diffdiscover3d.data.nifti_header import SUFFIXES, check_shape, check_size, read_header
from diffdiscover3d.memory import LARGE, check_memory, free_memory, segmentation_bytes

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


def network_config(folder: str | Path, level: int | None = None) -> dict | None:
    """The configuration in a discovery network's folder, without importing what would build it; `None` elsewhere.

    Args:
        level: of a nested network, 1 the coarsest; default: the finest.
    """
    try:
        levels = [json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))]
        while levels[0].get("parent"):
            levels.insert(0, levels[0]["parent"])
        config = levels[-1 if level is None else min(level, len(levels)) - 1]
        return config if {"num_parts", "channels", "window_size"} <= config.keys() else None
    except (OSError, ValueError, AttributeError):  # loading the model says what is wrong with it
        return None


def estimate_memory(path: Path, network: Mapping, on_cpu: bool) -> str | None:
    """A line about the memory that a large volume will take, from its header alone; `None` for a small one.

    Raises:
        InputError: if the header is unusable.
        MemoryLimitError: if there is less, and it is the machine's own memory that is used.
    """
    shape = check_shape(path, read_header(path))
    needed = segmentation_bytes(shape, network)
    if on_cpu:
        check_memory(path, shape, needed)
    if needed < LARGE:
        return None
    have = f" of {free_memory() / 2**30:.1f} GiB that are free" if on_cpu else ""
    return f"{path}: {' x '.join(map(str, shape[:3]))} voxels, about {needed / 2**30:.1f} GiB of memory needed{have}"
