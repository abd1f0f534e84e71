"""Files in, label maps out, on each input's own grid."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d import __version__
from diffdiscover3d.data.folder import list_volumes
from diffdiscover3d.data.nifti import read_nifti, write_like
from diffdiscover3d.data.nifti_header import SUFFIXES
from diffdiscover3d.data.preflight import estimate_memory, network_config
from diffdiscover3d.errors import DiffDiscoverError, MemoryLimitError, ModelError, NetworkError, OutputError
from diffdiscover3d.files import check_targets, sha256, staged_folder, write_json
from diffdiscover3d.hub import DEFAULT_MODEL, discovery_folder, discovery_source, embedded_models, load_discovery
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.reporting.provenance import peak_memory_mib, weights_sha256

DEFAULT_LEVEL = 2


@dataclass(frozen=True)
class SegmentedFile:
    """One input and what was written for it.

    Attributes:
        input, labels, sidecar, preview: paths; `preview` is `None` if it was not asked for.
        fractions: share of the voxels in each part.
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


def segment(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    model: str = DEFAULT_MODEL,
    level: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    preview: bool = False,
    overwrite: bool = False,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    progress: bool = False,
    on_done: Callable[[SegmentedFile], None] | None = None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
    on_estimate: Callable[[str], None] | None = None,
) -> list[SegmentedFile]:
    """Divide volumes into parts and write `<stem>_dseg.nii.gz` and `<stem>_dseg.json` for each.

    Args:
        inputs: NIfTI files, folders of them, globs or text lists.
        output: folder for the results (default: beside each input).
        model: an embedded model's name, a folder, or a Hub id.
        level: of an embedded model: 1, 2 or 3 for 2, 4 or 8 parts (default 2).
        revision: of a Hub repository.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:N" or "mps".
        preview: also write `<stem>_dseg.png`, three slices with the parts over them.
        overwrite: replace results that exist; the input itself is never overwritten.
        volume, nan_to_zero, ignore_affine: how to read unusual files, see [`read_nifti`].
        progress: show a bar for volumes that are segmented window by window.
        on_done: called after each input.
        on_estimate: called with a line about the memory a large volume will need, before it is read.
        on_error: called with the error of an input that cannot be used, and the others go on; without it, it raises.

    Raises:
        InputError, OutputError, ModelError, NetworkError, MemoryLimitError: see their descriptions.
        ValueError: for an unknown device.
    """
    single = isinstance(inputs, str | Path)
    paths = [p for source in ([inputs] if single else inputs) for p in _expand(source)]
    place = choose_device(device)
    jobs = [(path, _output_paths(path, output, preview)) for path in paths]
    _check_outputs(jobs, overwrite)
    level = DEFAULT_LEVEL if level is None and model in embedded_models() else level
    reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}

    network: StructureDiscoveryModel | None = None
    results = []
    for path, targets in jobs:
        try:
            # the scan is read whole before a model is loaded: a bad file is answered at once
            config = network.config if network else network_config(discovery_source(model, level), level)
            estimate = estimate_memory(path, config, place.type == "cpu") if config else None
            if estimate and on_estimate:
                on_estimate(estimate)
            clock = time.perf_counter()
            scan = read_nifti(path, **reading)
            read_seconds = time.perf_counter() - clock
            if network is None:
                network = load_discovery(model, level, revision).to(place)
            provenance = {
                "diffdiscover3d": __version__,
                "model": _describe_model(model, level, revision),
                "arguments": {"device": str(place), **reading},
                "seed": None,  # nothing is drawn at random
            }
            result = _segment_one(network, path, scan, targets, provenance, read_seconds, progress)
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


def _segment_one(network, path, scan, targets, provenance, read_seconds, progress) -> SegmentedFile:
    """Label one scan and write its results; if anything fails, none of what was written stays."""
    label_path, sidecar_path, preview_path = targets
    num_parts = network.config.num_parts
    clock = time.perf_counter()
    labels = _label(network, path, scan, progress)
    fractions = (np.bincount(labels.ravel(), minlength=num_parts) / labels.size).tolist()
    # a label map without its sidecar would pass for a result; older results stay until all the new ones are written
    with staged_folder(label_path.parent) as folder:
        write_like(folder / label_path.name, labels, scan, labels=True)
        if preview_path:
            picture = folder / preview_path.name
            save_slices(picture, [scan.data], [labels], spacing_mm=scan.spacing_mm, num_parts=num_parts)
        seconds = read_seconds + time.perf_counter() - clock
        provenance = {
            **provenance,
            "input": {"name": path.name, "sha256": sha256(path), "shape": list(scan.header.get_data_shape())},
            "parts": [{"index": k, "fraction": round(f, 6)} for k, f in enumerate(fractions)],
            "notes": list(scan.notes),
            "seconds": round(seconds, 3),
            "peak_memory_mib": peak_memory_mib(),
        }
        write_json(folder / sidecar_path.name, provenance)
    return SegmentedFile(path, label_path, sidecar_path, preview_path, tuple(fractions), scan.notes, seconds)


def choose_device(name: str) -> torch.device:
    """Turn "auto" into the best device there is, and refuse one that is not there.

    Raises:
        ValueError: if the device is unknown or missing on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def stem(path: Path) -> str:
    """A NIfTI file's name without its ending."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _expand(source: str | Path) -> list[Path]:
    path = Path(source)
    # a single file is passed on as it is: reading it says best what is wrong with it
    if path.name.endswith(SUFFIXES) and not path.is_dir() and not any(c in str(path) for c in "*?["):
        return [path]
    return list_volumes(source) if path.suffix != "" or path.is_dir() or not path.exists() else [path]


def _output_paths(path: Path, output: str | Path | None, preview: bool) -> tuple[Path, Path, Path | None]:
    folder = Path(output) if output is not None else path.parent
    name = stem(path) + "_dseg"
    return folder / f"{name}.nii.gz", folder / f"{name}.json", folder / f"{name}.png" if preview else None


def _check_outputs(jobs, overwrite: bool) -> None:
    """Find what would stop the writing before the work starts."""
    seen: dict[Path, Path] = {}
    inputs = {path.resolve() for path, _ in jobs}
    for path, targets in jobs:
        label_path = targets[0]
        if label_path in seen:
            raise OutputError(f"{path} and {seen[label_path]} would both write {label_path}; use two output folders.")
        seen[label_path] = path
        for target in filter(None, targets):
            if len(target.name.encode()) > 255:
                raise OutputError(f"{target}: the name is too long for a file; rename the input.")
            if target.exists() and path.exists() and target.samefile(path):
                raise OutputError(f"{target}: is the input itself; choose another --output folder.")
            if target.resolve() in inputs:
                raise OutputError(f"{target}: is one of the inputs; choose another --output folder.")
    check_targets((target for _, targets in jobs for target in targets if target), overwrite)


def _label(network: StructureDiscoveryModel, path: Path, scan, progress: bool) -> np.ndarray:
    try:
        found = network.segment(torch.from_numpy(scan.data), progress)
    except (MemoryError, RuntimeError) as error:
        # on the CPU torch raises a bare RuntimeError when memory runs out
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryLimitError(
            f"{path}: a volume of shape {scan.data.shape} does not fit into the memory of {network.device}; "
            "resample it, or use --device cpu or a larger machine."
        ) from error
    labels = found.labels[0].cpu().numpy()
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def _describe_model(model: str, level: int | None, revision: str | None) -> dict:
    described = {"id": model, "level": level, "revision": revision}
    folder = discovery_folder(model, revision)
    if not Path(discovery_source(model)).is_dir():
        described["commit"] = folder.name
    return {**described, "sha256": weights_sha256(folder)}
