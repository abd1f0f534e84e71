"""Files in, label maps out, on each input's own grid."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from diffdiscover3d import __version__
from diffdiscover3d.data.datasets.folder import list_volumes
from diffdiscover3d.data.formats.nifti.header import SUFFIXES, check_reachable
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, read_nifti
from diffdiscover3d.data.formats.nifti.slabs import SlabScan, open_slabs
from diffdiscover3d.errors import DiffDiscoverError, ModelError, NetworkError
from diffdiscover3d.hub.registry import DEFAULT_MODEL, discovery_folder, embedded_models, load_discovery, model_levels
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.segmentation.in_memory import SegmentedFile, label_scan
from diffdiscover3d.segmentation.out_of_core import label_streamed
from diffdiscover3d.segmentation.outputs import CaseFiles, Extras, check_cases, is_finished, plan_case, shard, stem
from diffdiscover3d.segmentation.preflight import MemoryPlan, network_config, plan_memory
from diffdiscover3d.utils.files import check_folder
from diffdiscover3d.utils.progress import Stages
from diffdiscover3d.utils.provenance import weights_sha256

__all__ = ["SegmentedFile", "choose_device", "segment", "stem"]

DEFAULT_LEVEL = 2
ORDERS = ("model", "size")
WORKING_GRID_FILE = "working_grid.json"


def segment(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    model: str = DEFAULT_MODEL,
    level: int | str | None = None,
    revision: str | None = None,
    device: str = "auto",
    fast: bool = False,
    order: str = "model",
    preview: bool = False,
    statistics: bool = False,
    tables: bool = False,
    probabilities: bool = False,
    report: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    progress: bool = False,
    on_done: Callable[[SegmentedFile], None] | None = None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
    on_skip: Callable[[Path], None] | None = None,
    on_estimate: Callable[[str], None] | None = None,
) -> list[SegmentedFile]:
    """Divide volumes into parts and write `<stem>_dseg.nii.gz`, `.json` and `.tsv` for each.

    A scan too large for the network to take at once stays on disk and is divided slab by slab, in memory bounded by its
    planes (see `models/window_layout.py`); `fast` and a model with a working grid need it in memory.

    Where several processes were started by `accelerate launch` or torchrun, each works on its share of the inputs.

    Args:
        inputs: NIfTI files, folders of them, globs or text lists.
        output: folder for the results (default: beside each input).
        model: an embedded model's name, a folder, or a Hub id.
        level: of a model with levels: its number, 1 the coarsest (default 2), or "all"; then the files are called
            `<stem>_level-<L>_dseg.*`, and `<stem>_tree.json` says which part lies in which.
        revision: of a Hub repository.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:N" or "mps".
        fast: segment at half the resolution and bring the probabilities back; about 8 times fewer voxels.
        order: number parts as the "model" does, so that a number means the same in every scan, or by their "size"
            in each scan: largest first, ties by centroid.
        preview: also write `<stem>_dseg.png`, three slices with the parts over them, a row per level.
        statistics: also measure spread, centroid, components and neighbours of every part.
        tables: also write colour tables for ITK-SNAP (`.label`) and 3D Slicer (`.ctbl`).
        probabilities: also write `<stem>_probseg.nii.gz`, (h, w, d, K) float32.
        report: also write `<stem>_report.html`, a page with a viewer that needs no network.
        overwrite: replace results that exist; the input itself is never overwritten.
        resume: skip inputs whose results are all there, made from the same file by the same model and arguments.
        volume, nan_to_zero, ignore_affine: how to read unusual files, see [`read_nifti`].
        progress: show a bar with stage and time left.
        on_done: called after each input.
        on_estimate: called with a line about the memory a large volume will need, before it is read.
        on_error: called with the error of an input that cannot be used, and the others go on; without it, it raises.
        on_skip: called with each input that `resume` skips.

    Raises:
        InputError, OutputError, ModelError, NetworkError, MemoryLimitError: see their descriptions.
        ValueError: for an unknown device or order.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}, got {order!r}.")
    single = isinstance(inputs, str | Path)
    paths = [p for source in ([inputs] if single else inputs) for p in _expand(source)]
    place = choose_device(device)
    if output is not None:
        check_folder(Path(output))
    folder = discovery_folder(model, revision)
    levels = choose_levels(model, level, folder)
    extras = Extras(preview, statistics, tables, probabilities, report)
    cases = [plan_case(path, output, levels, extras) for path in paths]
    mine = shard(cases)
    check_cases(cases, mine, overwrite or resume)
    reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
    arguments = {"device": str(place), **reading, "fast": fast, "order": order, "statistics": statistics}

    working = working_grid(folder)
    network = network_config(folder, levels[-1])
    networks: dict[int | None, StructureDiscoveryModel] = {}
    provenance: dict[int | None, dict] = {}
    results = []
    with Stages(total=len(mine) * (len(levels) + 2), enabled=progress) as stages:
        for number, case in enumerate(mine):
            stages.begin_case(f"scan {number + 1} of {len(mine)}", len(levels) + 2)
            try:
                stages.show("reading the scan")
                plan = MemoryPlan(False, None)  # where nothing is known of the network: loading it will say why
                if network is not None:
                    plan = plan_memory(case.input, network, place.type == "cpu", fast=fast, working=working)
                if plan.line and on_estimate:
                    on_estimate(plan.line)
                # all of the scan is looked at before a model is loaded: a bad file is answered at once
                clock = time.perf_counter()
                with _opened(case, plan.by_slabs, reading) as scan:
                    read_seconds = time.perf_counter() - clock
                    if not networks:
                        stages.show("loading the model")
                        networks = _load_levels(folder, levels, place)
                        provenance = _provenance(model, folder, levels, revision, arguments)
                    if resume and is_finished(case, provenance):
                        if on_skip:
                            on_skip(case.input)
                        continue
                    stages.done()
                    if plan.by_slabs:
                        result = label_streamed(networks, case, scan, provenance, extras, read_seconds, stages)
                    else:
                        result = label_scan(networks, working, case, scan, provenance, extras, read_seconds, stages)
            except DiffDiscoverError as error:
                # without a model no other input can be segmented either
                if on_error is None or isinstance(error, ModelError | NetworkError):
                    raise
                on_error(error)
                continue
            results.append(result)
            if on_done:
                on_done(result)
    return results


def choose_levels(model: str, level: int | str | None, folder: Path | None = None) -> tuple[int | None, ...]:
    """The levels meant by a number, "all" or nothing; `(None,)` for a model that has none.

    Args:
        folder: where the model lies, for a Hub id; without it, nothing is known of its levels.

    Raises:
        ModelError: if the model has no such level.
    """
    known = model_levels(model if folder is None else str(folder))
    if level == "all":
        return tuple(sorted(known)) or (None,)
    if level is None:
        if not known:
            return (None,)
        level = DEFAULT_LEVEL if DEFAULT_LEVEL in known else min(known)
    if known and level not in known:
        raise ModelError(f"{model} has the levels {sorted(known)}, not {level}.")
    return (int(level),)


def working_grid(folder: Path) -> tuple[int, int, int] | None:
    """The grid that scans are brought to for a network that [`discover`] trained, if its scans needed one."""
    file = folder / WORKING_GRID_FILE
    if not file.is_file():
        return None
    try:
        grid = json.loads(file.read_text(encoding="utf-8"))["grid"]
        if grid is not None and not (len(grid) == 3 and all(isinstance(n, int) and n > 1 for n in grid)):
            raise ValueError(f"`grid` must be three integers > 1, got {grid}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not readable ({error}); remove it to segment at full resolution.") from error
    return tuple(grid) if grid else None


def choose_device(name: str) -> torch.device:
    """Turn "auto" into the best device there is, and refuse one that is not there.

    Raises:
        ValueError: if the device is unknown or missing on this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # processes started together share the devices of the machine
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be auto, cpu, cuda, cuda:N or mps, got {name!r}.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ValueError(f"`device` {name!r} is not available on this machine; use auto or cpu.")
    return device


def _expand(source: str | Path) -> list[Path]:
    path = Path(source)
    check_reachable(path)
    # a single file is passed on as it is: reading it says best what is wrong with it
    if path.name.endswith(SUFFIXES) and not path.is_dir() and not any(c in str(path) for c in "*?["):
        return [path]
    return list_volumes(source) if path.suffix != "" or path.is_dir() or not path.exists() else [path]


def _load_levels(folder: Path, levels: Sequence[int | None], place: torch.device) -> dict:
    """The networks by level; those of one hierarchy share their weights, which are read once."""
    if len(levels) == 1:
        return {levels[0]: load_discovery(str(folder), levels[0]).to(place)}
    hierarchy = load_discovery(str(folder)).to(place).levels
    return {level: hierarchy[level - 1] for level in levels}


def _opened(case: CaseFiles, by_slabs: bool, reading: dict) -> AbstractContextManager[NiftiVolume | SlabScan]:
    """A scan, looked at whole: in memory, or on disk with what has to be decompressed where the results will lie."""
    if by_slabs:
        return open_slabs(case.input, next(iter(case)).parent, **reading)
    return nullcontext(read_nifti(case.input, **reading))


def _provenance(model: str, folder: Path, levels, revision: str | None, arguments: dict) -> dict[int | None, dict]:
    return {
        level: {
            "diffdiscover3d": __version__,
            "model": _describe_model(model, folder, level, revision),
            "arguments": arguments,
            "seed": None,  # nothing is drawn at random
        }
        for level in levels
    }


def _describe_model(model: str, folder: Path, level: int | None, revision: str | None) -> dict:
    described = {"id": model, "level": level, "revision": revision}
    if model not in embedded_models() and not Path(model).is_dir():
        described["commit"] = folder.name  # the cache keeps a snapshot under its commit
    return {**described, "sha256": weights_sha256(folder)}
