"""Checks of an input before it is read whole, and before the seconds that importing torch takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.data.datasets.listing import expand_all
from diffdiscover3d.data.formats.nifti.header import check_reachable
from diffdiscover3d.data.formats.reading import Source, open_source, read_source
from diffdiscover3d.data.formats.registry import files_of, format_by_name, is_nifti, split
from diffdiscover3d.models.window_layout import choose_window, needs_sliding_window, streaming_bytes
from diffdiscover3d.segmentation.device import is_device_name
from diffdiscover3d.segmentation.memory import (
    block_resampling_bytes,
    resampling_bytes,
    segmentation_bytes,
    soft_window_bytes,
)
from diffdiscover3d.segmentation.outputs import Extras, check_cases, plan_cases, shard
from diffdiscover3d.utils.files import read_json
from diffdiscover3d.utils.memory import LARGE, check_memory, free_memory

_READ_WHOLE = 2**25  # bytes on disk: smaller files are read twice
_READ_INTO = 2**29  # and bytes in memory, since a compressed file may expand a thousandfold


def refuse_early(inputs: Sequence[str], device: str = "auto", *, by_slabs: bool = False, **reading) -> None:
    """Raise the error that reading a single input would raise; several inputs, folders and lists are not checked.

    A small file is read whole, of a large one the header only. The command reads it again, before it loads a model.

    Args:
        inputs: as given to the command.
        device: if it is unknown, nothing is checked, since the command reports that first.
        by_slabs: the command may segment the file slab by slab, so that it need not fit into memory.
        reading: of [`read_volume`].

    Raises:
        InputError, MemoryLimitError: as [`read_nifti`].
    """
    if len(inputs) != 1 or not is_device_name(device):
        return
    path, inner = split(inputs[0])
    check_reachable(path)
    one = is_nifti(path) or format_by_name(path) is not None or inner is not None
    if not one or path.is_dir() or any(c in str(path) for c in "*?["):
        return
    with open_source(inputs[0], **reading) as file:
        if not by_slabs:
            check_memory(path, file.shape, file.reading_bytes)
        on_disk = sum(p.stat().st_size for p in files_of(inputs[0]))
        if on_disk <= _READ_WHOLE and file.reading_bytes <= _READ_INTO:
            read_source(file, **reading)


def refuse_taken(
    inputs: Sequence[str],
    output: Path | None,
    model: str,
    all_levels: bool,
    extras: Extras,
    include: Sequence[str] = (),
    series: str | None = None,
    share: str | None = None,
) -> None:
    """Raise what finding results in the way would raise, before anything slow is imported.

    The levels of a Hub model are not known yet: with all of them, nothing is looked for.

    Args:
        inputs, output, model, include, series, share: of [`segment`].
        all_levels: files of every level are written.
        extras: what else is written.

    Raises:
        InputError: if there are no inputs.
        OutputError: if a result exists.
    """
    count = _count_levels(model) if all_levels else 1
    if count is None:
        return
    levels = tuple(range(1, count + 1)) if count > 1 else (None,)
    cases = plan_cases(expand_all(inputs, include, series).volumes, output, levels, extras)
    check_cases(cases, shard(cases, share), overwrite=False)


def _count_levels(model: str) -> int | None:
    """How many levels an embedded model or one in a folder has; `None` for others."""
    folders = (Path(__file__).parent.parent / "assets" / model / "discovery", Path(model) / "discovery", Path(model))
    for folder in folders:
        try:
            config = read_json(folder / "config.json")
        except (OSError, ValueError):
            continue
        count = 1
        while isinstance(config, dict) and (config := config.get("parent")):
            count += 1
        return count
    return None


@dataclass(frozen=True)
class MemoryPlan:
    """How a volume is segmented, and a line for the user.

    Attributes:
        by_slabs: slab by slab from the disk, instead of in memory.
        line: about the memory that a large volume needs; `None` for a small one.
    """

    by_slabs: bool
    line: str | None


def plan_memory(
    file: Source,
    network: Mapping,
    on_cpu: bool,
    *,
    fast: bool = False,
    working: Sequence[int] | None = None,
    whole: bool = False,
) -> MemoryPlan:
    """Choose between memory and slabs from the header and the network, and check that the memory suffices.

    Args:
        file: the open volume, of which only the header has been read.
        network: configuration of the finest level, with its parents.
        on_cpu: the network runs in the machine's own memory.
        fast: segment at half the resolution, which needs the volume in memory.
        working: segment on this grid.
        whole: something else needs the volume in memory.

    Raises:
        MemoryLimitError: if `on_cpu` and the machine has less memory than needed.
    """
    path, shape, frame = file.path, file.shape, network.get("frame")
    min_max = network.get("scaling", "min_max") == "min_max"  # percentiles need all voxels
    large = min_max and frame is None and not whole and needs_sliding_window(shape, network)
    by_slabs = large and not fast
    remedy = {}
    if by_slabs:
        needed = streaming_bytes(working or shape, network)
        if working is not None:
            needed = max(needed + soft_window_bytes(working, network), block_resampling_bytes(shape, working, network))
    elif fast or (working or frame) is not None:
        grid = working or frame or tuple((n + 1) // 2 for n in shape[:3])
        needed = resampling_bytes(file.reading_bytes, shape, grid, network)
        if large:
            at_full = streaming_bytes(working or shape, network) / 2**30
            remedy = {"remedy": f"without --fast it is divided slab by slab in about {at_full:.1f} GiB"}
        elif working is not None:
            remedy = {"remedy": f"resample it to {' x '.join(map(str, working))} voxels, the grid the model works on"}
    else:
        needed = segmentation_bytes(shape, network)
    if on_cpu:
        check_memory(path, shape, needed, **remedy)
    if needed < LARGE:
        return MemoryPlan(by_slabs, None)
    have = f" of {free_memory() / 2**30:.1f} GiB that are free" if on_cpu else ""
    line = f"{path}: {' x '.join(map(str, shape[:3]))} voxels, about {needed / 2**30:.1f} GiB of memory needed{have}"
    if by_slabs:
        line += f"; divided slab by slab in windows of {choose_window(working or shape, network)} voxels"
    return MemoryPlan(by_slabs, line)
