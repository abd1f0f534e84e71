"""What can be said about an input before anything is read whole, or the seconds that importing torch takes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.data.formats.nifti.header import (
    SUFFIXES,
    check_fits,
    check_reachable,
    check_shape,
    check_size,
    read_header,
    reading_bytes,
)
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.models.window_layout import choose_window, slides, streaming_bytes
from diffdiscover3d.segmentation.memory import resampling_bytes, segmentation_bytes
from diffdiscover3d.utils.memory import LARGE, check_memory, free_memory

_READ_WHOLE = 2**25  # bytes on disk up to which reading a file twice costs less than it saves
_READ_INTO = 2**29  # and bytes of memory: a compressed file may grow a thousandfold
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")


def refuse_early(inputs: Sequence[str], device: str = "auto", *, by_slabs: bool = False, **reading) -> None:
    """Raise what reading the one input would raise; several inputs, folders and lists are left to the command.

    A small file is read whole, of a large one the header: the command looks at all of it again before any model.

    Args:
        device: an unknown one is a wrong use, and comes before anything about the file.
        by_slabs: the command may not need the file in memory as a whole: that it does not fit is no reason yet.
        reading: `volume`, `nan_to_zero`, `ignore_affine` of [`read_nifti`].

    Raises:
        InputError, MemoryLimitError: as [`read_nifti`].
    """
    if len(inputs) != 1 or not _DEVICE.fullmatch(device):
        return
    path = Path(inputs[0])
    check_reachable(path)
    if not path.name.endswith(SUFFIXES) or path.is_dir() or any(c in str(path) for c in "*?["):
        return
    header = read_header(path)
    shape = check_shape(path, header)
    check_size(path, header, shape)
    if not by_slabs:
        check_fits(path, header, shape)
    if path.stat().st_size <= _READ_WHOLE and reading_bytes(header, shape) <= _READ_INTO:
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


@dataclass(frozen=True)
class MemoryPlan:
    """How a volume is divided, and what a user is told about it beforehand.

    Attributes:
        by_slabs: from the disk, slab by slab, instead of in memory.
        line: about the memory that a large volume will take; `None` for a small one.
    """

    by_slabs: bool
    line: str | None


def plan_memory(
    path: Path, network: Mapping, on_cpu: bool, *, fast: bool = False, working: Sequence[int] | None = None
) -> MemoryPlan:
    """Decide from the header and the network alone how a volume is divided, and whether memory suffices.

    Args:
        network: configuration of the finest network asked for, which holds those above it.
        on_cpu: it is the machine's own memory that is used.
        fast, working: at half the resolution, or on this grid; both need the volume in memory.

    Raises:
        InputError: if the header is unusable.
        MemoryLimitError: if there is less memory than needed, and it is the machine's own.
    """
    header = read_header(path)
    shape = check_shape(path, header)
    check_size(path, header, shape)
    by_slabs = not fast and working is None and slides(shape, network)
    remedy = {}
    if by_slabs:
        needed = streaming_bytes(shape, network)
    elif fast or working is not None:
        grid = working or tuple((n + 1) // 2 for n in shape[:3])
        needed = resampling_bytes(header, shape, grid, network)
        if working is None and slides(shape, network):
            at_full = streaming_bytes(shape, network) / 2**30
            remedy = {"remedy": f"without --fast it is divided slab by slab in about {at_full:.1f} GiB"}
    else:
        needed = segmentation_bytes(shape, network)
    if on_cpu:
        check_memory(path, shape, needed, **remedy)
    if needed < LARGE:
        return MemoryPlan(by_slabs, None)
    have = f" of {free_memory() / 2**30:.1f} GiB that are free" if on_cpu else ""
    line = f"{path}: {' x '.join(map(str, shape[:3]))} voxels, about {needed / 2**30:.1f} GiB of memory needed{have}"
    if by_slabs:
        line += f"; divided slab by slab in windows of {choose_window(shape, network)} voxels"
    return MemoryPlan(by_slabs, line)
