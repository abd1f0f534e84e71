"""Files in, label maps out, on each input's own grid."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffdiscover3d import __version__
from diffdiscover3d.data.folder import list_volumes
from diffdiscover3d.data.nifti import NiftiVolume, read_nifti, write_like
from diffdiscover3d.data.nifti_header import SUFFIXES
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import DiffDiscoverError, MemoryLimitError, ModelError, NetworkError
from diffdiscover3d.files import sha256, write_json
from diffdiscover3d.hub import DEFAULT_MODEL, discovery_source, load_discovery, model_levels
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.progress import Stages
from diffdiscover3d.reporting.parts import measure_parts, nest_levels, number_by_size
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.reporting.provenance import peak_memory_mib, weights_sha256
from diffdiscover3d.reporting.tables import (
    COLUMNS,
    STATISTICS_COLUMNS,
    write_itksnap_labels,
    write_part_table,
    write_slicer_colours,
)
from diffdiscover3d.results import CaseFiles, Extras, LevelFiles, check_cases, is_finished, plan_case, shard, stem

__all__ = ["SegmentedFile", "choose_device", "segment", "stem"]

DEFAULT_LEVEL = 2
ORDERS = ("model", "size")
WORKING_GRID_FILE = "working_grid.json"
FAST_MIN_SIZE = 32  # voxels; where an axis is shorter, half of them would be too few


@dataclass(frozen=True)
class SegmentedFile:
    """One input and what was written for it; paths are `None` for what was not asked for.

    Attributes:
        input, preview, tree, report: paths.
        labels, sidecar: paths of the first level.
        levels: the files of every level.
        fractions: share of the voxels in each part of the first level.
        notes: what was unusual about the input.
        seconds: from reading to writing, without loading the model.
    """

    input: Path
    labels: Path
    sidecar: Path
    preview: Path | None
    fractions: tuple[float, ...]
    notes: tuple[str, ...]
    seconds: float
    levels: dict[int | None, LevelFiles]
    tree: Path | None = None
    report: Path | None = None


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
) -> list[SegmentedFile]:
    """Divide volumes into parts and write `<stem>_dseg.nii.gz`, `.json` and `.tsv` for each.

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
        on_error: called with the error of an input that cannot be used, and the others go on; without it, it raises.
        on_skip: called with each input that `resume` skips.

    Raises:
        InputError, OutputError, ModelError, NetworkError: see their descriptions.
        ValueError: for an unknown device or order.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}, got {order!r}.")
    single = isinstance(inputs, str | Path)
    paths = [p for source in ([inputs] if single else inputs) for p in _expand(source)]
    place = choose_device(device)
    levels = choose_levels(model, level)
    extras = Extras(preview, statistics, tables, probabilities, report)
    cases = [plan_case(path, output, levels, extras) for path in paths]
    mine = shard(cases)
    check_cases(cases, mine, overwrite or resume)
    reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
    arguments = {"device": str(place), **reading, "fast": fast, "order": order, "statistics": statistics}

    working = working_grid(model)
    networks: dict[int | None, StructureDiscoveryModel] = {}
    provenance: dict[int | None, dict] = {}
    results = []
    with Stages(total=len(mine) * (len(levels) + 2), enabled=progress) as stages:
        for number, case in enumerate(mine):
            stages.begin_case(f"scan {number + 1} of {len(mine)}", len(levels) + 2)
            try:
                stages.show("reading the scan")
                # the scan is read whole before a model is loaded: a bad file is answered at once
                clock = time.perf_counter()
                scan = read_nifti(case.input, **reading)
                read_seconds = time.perf_counter() - clock
                if not networks:
                    stages.show("loading the model")
                    networks = {x: load_discovery(model, x, revision).to(place) for x in levels}
                    provenance = _provenance(model, levels, revision, arguments)
                if resume and is_finished(case, provenance):
                    if on_skip:
                        on_skip(case.input)
                    continue
                stages.done()
                result = _segment_one(networks, working, case, scan, provenance, extras, read_seconds, stages)
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


def _segment_one(networks, working, case: CaseFiles, scan: NiftiVolume, provenance, extras, read_seconds, stages):
    """Label one scan at every level and write its results; if anything fails, none of what was written stays."""
    maps: dict[int | None, np.ndarray] = {}
    num_parts = {level: network.config.num_parts for level, network in networks.items()}
    notes = list(scan.notes)
    fractions: dict[int | None, tuple[float, ...]] = {}
    arguments = next(iter(provenance.values()))["arguments"]
    digest = sha256(case.input)
    with contextlib.ExitStack() as written:
        clock = time.perf_counter()
        sidecars = {}
        for level, network in networks.items():
            stages.show("finding the parts" + (f" of level {level}" if len(networks) > 1 else ""))
            files = case.levels[level]
            soft = _probabilities(network, case.input, scan, arguments["fast"], working, notes)
            labels = soft.argmax(dim=0).to(torch.uint8 if len(soft) <= 256 else torch.int32).cpu().numpy()
            labels = labels if labels.dtype == np.uint8 else labels.astype(np.uint16)
            if arguments["order"] == "size":
                numbers = number_by_size(labels, num_parts[level])
                labels = np.argsort(numbers).astype(labels.dtype)[labels]
                soft = soft[torch.as_tensor(numbers, device=soft.device)]
            maps[level] = labels
            write_like(files.labels, labels, scan, labels=True)
            written.callback(files.labels.unlink, missing_ok=True)
            if files.probabilities:
                write_like(files.probabilities, np.moveaxis(soft.cpu().numpy(), 0, -1), scan)
                written.callback(files.probabilities.unlink, missing_ok=True)
            del soft
            parts = measure_parts(labels, scan.data, scan.affine, num_parts[level], topology=extras.statistics)
            _write_tables(files, parts, written)
            fractions[level] = tuple(p.voxels / labels.size for p in parts)
            sidecars[level] = {
                "parts": [{"index": k, "fraction": round(f, 6)} for k, f in enumerate(fractions[level])],
                **COLUMNS,
                **(STATISTICS_COLUMNS if extras.statistics else {}),
            }
            stages.done()
        stages.show("writing the results")
        if case.tree:
            write_json(case.tree, {"input": case.input.name, "tree": nest_levels(maps, num_parts)})
            written.callback(case.tree.unlink, missing_ok=True)
        if case.preview:
            titles = [f"level {level}" for level in maps] if len(maps) > 1 else None
            most, rows = max(num_parts.values()), [scan.data] * len(maps)
            save_slices(
                case.preview, rows, list(maps.values()), spacing_mm=scan.spacing_mm, titles=titles, num_parts=most
            )
            written.callback(case.preview.unlink, missing_ok=True)
        seconds = read_seconds + time.perf_counter() - clock
        for level, files in case.levels.items():
            sidecar = {
                **provenance[level],
                "input": {"name": case.input.name, "sha256": digest, "shape": list(scan.header.get_data_shape())},
                **sidecars[level],
                "notes": notes,
                "seconds": round(seconds, 3),
                "peak_memory_mib": peak_memory_mib(),
            }
            write_json(files.sidecar, sidecar)
            written.callback(files.sidecar.unlink, missing_ok=True)
        if case.report:
            from diffdiscover3d.reporting.page import write_report

            write_report(case.report, scan, case.input.name, [files.labels for files in case.levels.values()])
        # a label map without its sidecar would pass for a result, so all vanish if one fails; now none has
        written.pop_all()
        stages.done()
    first = next(iter(case.levels))
    return SegmentedFile(
        case.input,
        case.levels[first].labels,
        case.levels[first].sidecar,
        case.preview,
        fractions[first],
        tuple(notes),
        seconds,
        case.levels,
        case.tree,
        case.report,
    )


def choose_levels(model: str, level: int | str | None) -> tuple[int | None, ...]:
    """The levels meant by a number, "all" or nothing; `(None,)` for a model that has none.

    Raises:
        ModelError: if the model has no such level.
    """
    known = model_levels(model)
    if level == "all":
        return tuple(sorted(known)) or (None,)
    if level is None:
        if not known:
            return (None,)
        level = DEFAULT_LEVEL if DEFAULT_LEVEL in known else min(known)
    if known and level not in known:
        raise ModelError(f"{model} has the levels {sorted(known)}, not {level}.")
    return (int(level),)


def working_grid(model: str) -> tuple[int, int, int] | None:
    """The grid that scans are brought to for a model folder written by [`discover`], if its scans needed one."""
    file = Path(model) / WORKING_GRID_FILE
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
    # a single file is passed on as it is: reading it says best what is wrong with it
    if path.name.endswith(SUFFIXES) and not path.is_dir() and not any(c in str(path) for c in "*?["):
        return [path]
    return list_volumes(source) if path.suffix != "" or path.is_dir() or not path.exists() else [path]


def _write_tables(files: LevelFiles, parts, written: contextlib.ExitStack) -> None:
    write_part_table(files.table, parts)
    written.callback(files.table.unlink, missing_ok=True)
    for path, write in ((files.itksnap, write_itksnap_labels), (files.slicer, write_slicer_colours)):
        if path:
            write(path, len(parts))
            written.callback(path.unlink, missing_ok=True)


def _probabilities(network, path: Path, scan: NiftiVolume, fast: bool, working, notes: list[str]) -> torch.Tensor:
    """(K, H, W, D) soft parts; on a working grid, or with `fast` at half the resolution, linearly interpolated."""
    volume = torch.from_numpy(scan.data)
    grid = tuple(volume.shape)
    try:
        size = working or grid
        if fast and min(size) >= FAST_MIN_SIZE:
            size = tuple((n + 1) // 2 for n in size)
        if size != grid:
            found = network.segment(resize_volume(volume[None, None].to(network.device), size))
            return F.interpolate(found.probabilities, size=grid, mode="trilinear", align_corners=False)[0]
        note = f"too small to be halved ({FAST_MIN_SIZE} voxels are needed along each axis); done at full resolution"
        if fast and not working and note not in notes:
            notes.append(note)
        return network.segment(volume).probabilities[0]
    except (MemoryError, RuntimeError) as error:
        # on the CPU torch raises a bare RuntimeError when memory runs out
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryLimitError(
            f"{path}: a volume of shape {grid} does not fit into the memory of {network.device}; "
            "use --fast, resample it, or use --device cpu or a larger machine."
        ) from error


def _provenance(model: str, levels, revision: str | None, arguments: dict) -> dict[int | None, dict]:
    return {
        level: {
            "diffdiscover3d": __version__,
            "model": _describe_model(model, level, revision),
            "arguments": arguments,
            "seed": None,  # nothing is drawn at random
        }
        for level in levels
    }


def _describe_model(model: str, level: int | None, revision: str | None) -> dict:
    source = discovery_source(model, level)
    described = {"id": model, "level": level, "revision": revision}
    if Path(source).is_dir():
        described["sha256"] = weights_sha256(source)
    return described
