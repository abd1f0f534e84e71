"""The scans of a `discover` run: read once, planned for, and compared with those of an earlier run."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.domain import signature, summarise
from diffdiscover3d.data.formats.nifti.reading import write_like
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import SEPARATOR, volume_sha256, with_options
from diffdiscover3d.data.formats.units import IN_MM, UNKNOWN, parse_voxel_size
from diffdiscover3d.errors import DiffDiscoverError, InputError, ModelError, OutputError
from diffdiscover3d.segmentation.arrays import as_scan, is_in_memory
from diffdiscover3d.segmentation.driver import choose_device
from diffdiscover3d.utils.files import atomic_file, check_folder, write_json
from diffdiscover3d.utils.memory import free_memory
from diffdiscover3d.workflows.discover_plan import Plan, describe_plan, make_plan, read_plan


@dataclass(frozen=True)
class DiscoverRun:
    """A run whose scans have been read.

    Attributes:
        plan: of the trainings.
        domain: what is known of the scans.
        output: folder of the run.
        device: as given, and `place` as chosen.
        verbose: show the logs of the trainings.
        volumes: those that were given in memory, by the path of the file that holds each.
    """

    plan: Plan
    domain: dict
    output: Path
    device: str
    place: torch.device
    verbose: bool
    volumes: dict


def prepare(
    output: Path,
    source,
    *,
    preset: str,
    levels: int,
    device: str,
    seed: int,
    spacing: str | Sequence[float] | None,
    volume: int | None,
    resolution: int | None,
    nan_to_zero: bool,
    ignore_affine: bool,
    missing_chunks: bool,
    voxel_size: str | None,
    series: str | None,
    include: Sequence[str],
    resume: bool,
    verbose: bool,
    on_step,
    on_error,
) -> DiscoverRun:
    """Read all scans, and make the plan of the trainings or read that of an earlier run; see [`discover`]."""
    check_folder(output)
    place = choose_device(device)
    plan_file = output / "plan.json"
    if plan_file.exists() and not resume:
        raise OutputError(f"{output}: holds an earlier run; --resume continues it, or choose another --output folder.")
    on_step("Reading the scans")
    volumes: dict[str, object] = {}
    source = [source] if is_in_memory(source) else source
    if isinstance(source, str | Path):
        paths = list_volumes(source, include, series)
    else:
        paths = _keep_volumes(source, output / "scans", nan_to_zero)
        volumes = {str(path.absolute()): one for path, one in zip(paths, source, strict=True) if is_in_memory(one)}
    paths = [with_options(path, volume=volume, resolution=resolution) for path in paths]
    given = _target_in_mm(spacing)
    reading = {"nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine, "missing_chunks": missing_chunks}
    reading = {name: value for name, value in {**reading, "voxel_size": voxel_size}.items() if value}
    scans, shapes, spacings, units, sha256, domain = _read_all(paths, reading, on_error)
    if plan_file.exists():
        plan = read_plan(plan_file)
        if [_location(scan) for scan in plan.scans] != [_location(scan) for scan in scans]:
            raise ModelError(f"{plan_file}: is of other scans than {source}; choose another --output folder.")
        if plan.reading != reading:
            raise ModelError(
                f"{plan_file}: its scans were read with the options {plan.reading}, now with {reading}; give the same "
                "options, or choose another --output folder."
            )
        check_unchanged(plan, sha256)
    else:
        memory = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else free_memory()
        unit = "voxel" if UNKNOWN in units else "mm"
        if given is not None and unit != "mm":
            raise ValueError("`spacing` needs the voxel size of every scan, and one gives none; leave it out.")
        options = {"preset": preset, "levels": levels, "seed": seed, "spacing": given, "spacing_unit": unit}
        plan = make_plan(shapes, spacings, scans, memory_bytes=memory, **options)
        plan = replace(plan, sha256=tuple(sha256), reading=reading)
        write_json(plan_file, asdict(plan))
    on_step(describe_plan(plan))
    return DiscoverRun(plan, domain, output, device, place, verbose, volumes)


def check_unchanged(plan: Plan, sha256: Sequence[str] | None = None) -> None:
    """Compare the scans with those of the plan, so that all trainings and results are of the same ones.

    Args:
        sha256: of the scans; default: read again.
    """
    now = [volume_sha256(scan) for scan in plan.scans] if sha256 is None else sha256
    for scan, before, after in zip(plan.scans, plan.sha256 or now, now, strict=True):
        if before != after:
            raise InputError(
                f"{scan}: has changed since this run began; restore it, or start anew in another --output folder."
            )


def _read_all(
    paths: Sequence[Path], reading: dict, on_error
) -> tuple[list[str], list, list, set[str], list[str], dict]:
    """Read every scan once, so that a damaged one is reported before the trainings."""
    scans, shapes, spacings, units, hashes, signatures = [], [], [], set(), [], []
    for path in paths:
        try:
            volume = read_volume(path, **reading)
        except DiffDiscoverError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        place, inner = str(path).partition(SEPARATOR)[::2]
        # a link keeps its name: git-annex and the Hub's cache link to files whose names are hashes
        scans.append(str(Path(place).absolute()) + (f"{SEPARATOR}{inner}" if inner else ""))
        shapes.append(volume.data.shape)
        spacings.append(volume.spacing_mm)
        units.add(volume.unit)
        hashes.append(volume.sha256)
        signatures.append(signature(volume))
    if not scans:
        raise InputError("none of the scans can be read.")
    return scans, shapes, spacings, units, hashes, summarise(signatures, spacings)


def _location(scan: str) -> tuple[Path, str]:
    """Where a scan is on disk, however its path is written."""
    place, inner = scan.partition(SEPARATOR)[::2]
    return Path(os.path.realpath(place)), inner


def _target_in_mm(spacing: str | Sequence[float] | None) -> tuple[float, ...] | None:
    """A target spacing in mm, from three numbers in mm or lengths with a unit.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(spacing, str):
        edges, unit = parse_voxel_size(spacing, "spacing")
        return tuple(edge * IN_MM[unit] for edge in edges)
    if spacing is not None and (len(spacing) != 3 or not min(spacing) > 0):
        raise ValueError(f"`spacing` must be three positive numbers, got {spacing}.")
    return None if spacing is None else tuple(map(float, spacing))


def _keep_volumes(volumes: Sequence, folder: Path, nan_to_zero: bool) -> list[Path]:
    """Write volumes in memory as files, so that a run can be continued; those that are there stay.

    Images become NIfTI; arrays, which have no voxel size, NumPy files.
    """
    paths = []
    for number, one in enumerate(volumes):
        if isinstance(one, str | Path):
            paths.append(Path(one))
            continue
        scan, _ = as_scan(one, nan_to_zero=nan_to_zero)
        sized = scan.unit != UNKNOWN
        paths.append(folder / f"scan-{number:03d}.{'nii.gz' if sized else 'npy'}")
        if paths[-1].exists():
            continue
        if sized:
            write_like(paths[-1], scan.data, scan)
        else:
            with atomic_file(paths[-1], ".npy") as temporary:
                np.save(temporary, scan.data)
    return paths
