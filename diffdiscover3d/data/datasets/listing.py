"""What a folder, glob or text list holds: its volumes, and what was left out and why."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from diffdiscover3d.data.datasets.entries import read_list, walk
from diffdiscover3d.data.formats import dicom, ome_zarr
from diffdiscover3d.data.formats.nifti.header import check_reachable, read_affine
from diffdiscover3d.data.formats.nifti.source import NiftiFile
from diffdiscover3d.data.formats.reading import open_source
from diffdiscover3d.data.formats.registry import (
    NAMES,
    SEPARATOR,
    dicom_in,
    format_by_name,
    is_nifti,
    is_volume,
    recognise,
    split,
    stem,
)
from diffdiscover3d.data.formats.units import display_unit
from diffdiscover3d.errors import InputError, without_options
from diffdiscover3d.utils.files import read_json

# words in the names of files that mark something in a scan rather than being one
_MASK_WORDS = (
    "mask|masks|brainmask|seg|segs|segmentation|segmentations|label|labels|labelmap|lesion|lesions|gt|groundtruth|"
    "truth|aseg|aparc|wmparc|parcellation|annotation|annotations"
)
_MASK = re.compile(rf"(?:^|[^a-z0-9])(?:{_MASK_WORDS})(?:$|[^a-z])|brain_?mask", re.IGNORECASE)
_OWN = re.compile(r"_(?:dseg|probseg)$|_stage\d+$|_level-\d+_truth$")
_OWN_REASON = "a result of this program by its name or sidecar; --include PATTERN takes it"
_SIDECAR_KEYS = {"diffdiscover3d", "model", "input"}  # of a label map of `segment`
_SIDECAR_BYTES = 2**20
_SECOND_HALVES = (".img", ".img.gz")


@dataclass(frozen=True)
class Contents:
    """What was found.

    Attributes:
        volumes: sorted; a volume that is one of several in a file or folder has its name behind `::`.
        left_out: files and folders that are volumes or might be, with the reason.
        others: how many files have other endings.
    """

    volumes: tuple[Path, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    others: int = 0


def list_volumes(source: str | Path, include: Sequence[str] = (), series: str | None = None) -> list[Path]:
    """The volumes a user means, sorted.

    Args:
        source: a folder (searched with its subfolders), a glob pattern, a text file with one path a line (relative
            to that file; empty lines and lines from # on are ignored) or a JSON list of paths, or one volume. In
            folders and globs, files that are or are named like results of this program are left out, and so are
            files named like masks where there are others.
        include: patterns of file names that are taken though they are named like masks.
        series: of a folder with several DICOM series: the number or UID of the one to take.

    Raises:
        InputError: if there are none, or a listed file does not exist.
    """
    return list(look_into(source, include, series).volumes)


def expand(source: str | Path, include: Sequence[str] = (), series: str | None = None) -> list[Path]:
    """The volumes that one argument of a command names; a single file is returned unchecked.

    Args:
        source, include, series: as for [`list_volumes`].

    Raises:
        InputError: as [`list_volumes`].
    """
    path, inner = split(source)
    check_reachable(path)
    # reading a single file gives the most precise reason if it cannot be used
    one = inner is not None or is_nifti(path) or format_by_name(path) is not None
    if one and not path.is_dir() and not any(c in str(path) for c in "*?["):
        return [Path(source)]
    named = path.suffix != "" or path.is_dir() or not path.exists()
    return list_volumes(source, include, series) if named or is_volume(path) else [path]


def expand_all(sources: Sequence[str | Path], include: Sequence[str] = (), series: str | None = None) -> Contents:
    """The volumes that all arguments of a command name, in their order, each once.

    Of several arguments, which a shell may have made of a glob, results of this program are left out.

    Args:
        sources: each as for [`expand`].
        include, series: as for [`list_volumes`].

    Raises:
        InputError: as [`list_volumes`].
    """
    volumes, left_out = [], []
    for source in sources:
        path, inner = split(source)
        check_reachable(path)
        several = path.is_dir() or any(c in str(path) for c in "*?[")
        if several and inner is None and not ome_zarr.is_store(path):
            found = look_into(source, include, series)
        else:
            found = Contents(tuple(expand(source, include, series)))
        for volume in found.volumes:
            if len(sources) > 1 and not several and _is_own(volume) and not _is_included(volume, include):
                left_out.append((volume, _OWN_REASON))
            else:
                volumes.append(volume)
        left_out += found.left_out
    if not volumes:
        first = f"{left_out[0][0]}: {left_out[0][1]}" if left_out else "no volumes; give scans"
        raise InputError(f"{first}.")
    unique: dict[str, str | Path] = {}
    for volume in volumes:  # a folder and a file in it, or one path written in two ways
        folder, name = os.path.split(volume)
        unique.setdefault(os.path.join(os.path.realpath(folder), name), volume)
    return Contents(tuple(unique.values()), tuple(left_out))


def look_into(source: str | Path, include: Sequence[str] = (), series: str | None = None) -> Contents:
    """The same, with what was left out.

    Raises:
        InputError: if there are no volumes, or a listed file does not exist.
    """
    path, inner = split(source)
    check_reachable(path)
    if inner is not None:
        found = Contents((Path(source),))
    elif path.is_dir() and not ome_zarr.is_store(path):
        found = _search(path, include, series)
    elif path.exists():
        known = is_nifti(path) or recognise(path) is not None
        found = Contents((path,) if known else tuple(read_list(path)))
    else:
        found = _choose((Path(p) for p in glob.glob(str(source), recursive=True)), include, by_content=True)
    if not found.volumes:
        if found.left_out:
            first, reason = found.left_out[0]
            raise InputError(f"{source}: no volume in it can be used; {first.name}: {reason}.")
        raise InputError(f"{source}: no volumes; give a folder, a glob, a text list or a {NAMES} file.")
    return Contents(tuple(sorted(found.volumes)), tuple(sorted(found.left_out)), found.others)


def describe_left_out(contents: Contents) -> list[str]:
    """A line for each reason, with how many files and the first of them."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in contents.left_out:
        by_reason.setdefault(reason, []).append(path)
    return [f"left out: {paths[0].name}{_and(len(paths) - 1)}: {reason}" for reason, paths in by_reason.items()]


def describe_volume(path: Path) -> dict:
    """The contents of a volume's header as JSON values.

    Returns:
        `path`, and `format`, `shape`, `voxel_size` (along the axes of the file, in `unit`) and `dtype`; or `fault`, the
        reason why it cannot be used.
    """
    described = {"path": str(path)}
    try:
        with open_source(path) as source:
            nifti = isinstance(source, NiftiFile)
            affine = read_affine(source.path, source.header, True, []) if nifti else source.affine
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            unit = display_unit(spacing, "mm" if nifti else source.unit)
            return {
                **described,
                "format": "NIfTI" if nifti else recognise(path).NAME,
                "shape": list(source.shape),
                "voxel_size": [float(s * unit.per_mm) for s in spacing],
                "unit": unit.length,
                "dtype": str(source.header.get_data_dtype() if nifti else source.dtype),
            }
    except InputError as error:
        return {**described, "fault": without_options(str(error)).removeprefix(f"{path}: ")}


def _and(count: int) -> str:
    return f" and {count} more" if count else ""


def _search(folder: Path, include: Sequence[str], series: str | None) -> Contents:
    files, suspects, others, barred = [], [], 0, []
    for path in walk(folder, barred):
        if path.is_dir() or is_nifti(path) or format_by_name(path) not in (None, dicom):
            files.append(path)
        elif path.suffix.lower() in dicom.SUFFIXES or _starts_as_dicom(path):
            suspects.append(path)
        else:
            others += 1
    found = _choose(files, include)
    found = Contents(found.volumes, (*found.left_out, *barred))
    if not suspects:
        return Contents(found.volumes, found.left_out, others)
    try:
        listed, stray = dicom_in(folder)
    except InputError as error:  # the library is missing: without other volumes that is what matters
        if not found.volumes:
            raise
        return Contents(found.volumes, (*found.left_out, (suspects[0], str(error).split(": ", 1)[-1])), others)
    good = {s.uid: s for s in listed if dicom.fault_of(s) is None}
    usable = {uid: s for uid, s in good.items() if series in (None, uid, str(s.number))}
    left_out = [*stray.items()]
    for one in listed:
        if one.uid not in usable:
            reason = dicom.fault_of(one)
            reason = f"a DICOM series that {reason}" if reason else f"a DICOM series other than {series}"
            left_out.append((one.folder / f"series {one.number or one.uid}", reason))
    volumes = [_reference(one, good.values()) for one in usable.values()]
    return Contents((*found.volumes, *volumes), (*found.left_out, *left_out), others)


def _reference(series: dicom.Series, good: Iterable[dicom.Series]) -> Path:
    """The folder of a series; with its UID, where the folder or one below it holds others without a fault."""
    folder = Path(os.path.commonpath([s.path.parent for s in series.slices]))
    alone = all(one is series or not any(s.path.is_relative_to(folder) for s in one.slices) for one in good)
    return folder if alone else Path(f"{folder}{SEPARATOR}{series.uid}")


def _starts_as_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return dicom.matches(file.read(132))
    except OSError:
        return False


def _choose(paths: Iterable[Path], include: Sequence[str], by_content: bool = False) -> Contents:
    """Sort volumes from masks and own results; masks are taken where nothing else is there.

    Args:
        by_content: also take folders of DICOM files, and files that are volumes by their first bytes.
    """
    volumes, masks, left_out = [], [], []
    for path in paths:
        known = is_nifti(path) or (format_by_name(path) is not None) or ome_zarr.is_store(path)
        if not known and by_content and path.exists():
            known = recognise(path) is not None
        if not known or (path.is_dir() and not ome_zarr.is_store(path) and not by_content):
            continue
        if path.is_dir() and is_nifti(path):
            continue
        if path.name.lower().endswith(_SECOND_HALVES) and _first_half(path).is_file():
            continue
        if _is_included(path, include):
            volumes.append(path)
        elif _is_own(path):
            left_out.append((path, _OWN_REASON))
        elif _MASK.search(stem(path)):
            masks.append(path)
        else:
            volumes.append(path)
    if not volumes:
        return Contents(tuple(masks), tuple(left_out))
    left_out += [(path, "named like a mask; --include PATTERN takes it") for path in masks]
    return Contents(tuple(volumes), tuple(left_out))


def _is_included(path: Path, include: Sequence[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in include)


def _is_own(path: Path) -> bool:
    """Whether a file is a result of this program, by its name or, if it has a name of its own, its sidecar."""
    if _OWN.search(stem(path)):
        return True
    place = split(path)[0]
    sidecar = place.with_name(f"{stem(place)}.json")
    try:
        if sidecar.stat().st_size > _SIDECAR_BYTES:
            return False
        written = read_json(sidecar)
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.keys() >= _SIDECAR_KEYS


def _first_half(path: Path) -> Path:
    return path.with_name(re.sub(r"\.img(\.gz)?$", r".hdr\1", path.name, flags=re.IGNORECASE))
