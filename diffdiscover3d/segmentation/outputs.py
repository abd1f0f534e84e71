"""The names of a scan's result files, and checks before they are written."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.data.formats.registry import (
    LABEL_SUFFIXES,
    folder_of,
    label_suffix,
    split,
    stem,
    volume_sha256,
)
from diffdiscover3d.data.formats.volume_file import NiftiGrid
from diffdiscover3d.errors import InputError, ModelError, OutputError
from diffdiscover3d.reporting.colours import part_rgb
from diffdiscover3d.utils.files import check_regular, check_targets, read_json
from diffdiscover3d.utils.processes import rank_and_world_size


@dataclass(frozen=True)
class Extras:
    """The files written on request; see the options of the same names of [`segment`]."""

    preview: bool = False
    statistics: bool = False
    tables: bool = False
    probabilities: bool = False
    report: bool = False


@dataclass(frozen=True)
class LevelFiles:
    """The files of one level of one scan; `None` for those not requested."""

    labels: Path
    sidecar: Path
    table: Path
    itksnap: Path | None
    slicer: Path | None
    probabilities: Path | None


@dataclass(frozen=True)
class CaseFiles:
    """One scan and its result files."""

    input: Path
    levels: dict[int | None, LevelFiles]
    preview: Path | None
    tree: Path | None
    report: Path | None

    @property
    def folder(self) -> Path:
        """The folder of all these files."""
        return next(iter(self)).parent

    def __iter__(self) -> Iterator[Path]:
        for level in self.levels.values():
            yield from filter(None, vars(level).values())
        yield from filter(None, (self.preview, self.tree, self.report))


def plan_case(path: Path, output: str | Path | None, levels: Sequence[int | None], extras: Extras) -> CaseFiles:
    """Name the files of a scan: `<stem>_dseg.*`, or `<stem>_level-<L>_dseg.*` where there are several levels."""
    if output is not None and names_a_file(output):
        return _plan_file(path, Path(output), levels, extras)
    folder = Path(output) if output is not None else folder_of(path)
    name, suffix = stem(path), label_suffix(path)

    def level_files(level: int | None) -> LevelFiles:
        base = name if len(levels) == 1 else f"{name}_level-{level}"
        return LevelFiles(
            folder / f"{base}_dseg{suffix}",
            folder / f"{base}_dseg.json",
            folder / f"{base}_dseg.tsv",
            folder / f"{base}_dseg.label" if extras.tables else None,
            folder / f"{base}_dseg.ctbl" if extras.tables else None,
            folder / f"{base}_probseg.nii.gz" if extras.probabilities else None,
        )

    return CaseFiles(
        path,
        {level: level_files(level) for level in levels},
        folder / f"{name}_dseg.png" if extras.preview else None,
        folder / f"{name}_tree.json" if len(levels) > 1 else None,
        folder / f"{name}_report.html" if extras.report else None,
    )


def plan_cases(
    paths: Sequence[Path], output: str | Path | None, levels: Sequence[int | None], extras: Extras
) -> list[CaseFiles]:
    """Name the files of all scans, see [`plan_case`].

    If two scans in different folders have one name (`sub-01/T1w.nii.gz`, `sub-02/T1w.nii.gz`), the results of all scans
    keep the folders in which the scans are, below `output`.
    """
    cases = [plan_case(path, output, levels, extras) for path in paths]
    if output is None or names_a_file(output) or _are_distinct(cases):
        return cases
    folders = [Path(output) / folder for folder in relative_folders(paths)]
    kept = [plan_case(path, folder, levels, extras) for path, folder in zip(paths, folders, strict=True)]
    return kept if _are_distinct(kept) else cases


def _are_distinct(cases: Sequence[CaseFiles]) -> bool:
    targets = [target for case in cases for target in case]
    return len(set(targets)) == len(targets)


def relative_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of scans, relative to the folder that holds all of them."""
    folders = [os.path.abspath(folder_of(path)) for path in paths]
    common = os.path.commonpath(folders)
    return [Path(os.path.relpath(folder, common)) for folder in folders]


def names_a_file(output: str | Path) -> bool:
    """Whether an output is the name of a label map rather than of a folder."""
    return not Path(output).is_dir() and Path(output).name.endswith((".nii.gz", ".nii", *LABEL_SUFFIXES))


def _plan_file(path: Path, output: Path, levels: Sequence[int | None], extras: Extras) -> CaseFiles:
    """The files of a scan whose label map has a name of its own; the others are called after it."""
    if len(levels) != 1:
        raise ValueError(f"`output` {output} is one file; name a folder for several levels.")
    own = label_suffix(path)
    if not output.name.endswith((".nii.gz", ".nii", own)):
        raise ValueError(f"`output` {output} must end in {own} or .nii.gz for {path}.")
    folder, name = output.parent, stem(output)
    files = LevelFiles(
        output,
        folder / f"{name}.json",
        folder / f"{name}.tsv",
        folder / f"{name}.label" if extras.tables else None,
        folder / f"{name}.ctbl" if extras.tables else None,
        folder / f"{name}_probseg.nii.gz" if extras.probabilities else None,
    )
    picture = folder / f"{name}.png" if extras.preview else None
    return CaseFiles(path, {levels[0]: files}, picture, None, folder / f"{name}_report.html" if extras.report else None)


@contextmanager
def label_map(
    path: Path, scan: NiftiVolume | SlabScan, dtype: np.dtype, num_parts: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a label map in the family of the scan's format: yields a function that takes planes, see [`ResultGrid`]."""
    shape = scan.grid.shape if isinstance(scan, SlabScan) else scan.to_input_grid(scan.data).shape
    colours = [tuple(round(255 * c) for c in part_rgb(part)) for part in range(num_parts)]
    grid = NiftiGrid(scan.header) if path.name.endswith((".nii", ".nii.gz")) else scan.results
    with grid.stream(path, dtype, shape, colours) as write:
        yield write


def check_cases(cases: Sequence[CaseFiles], mine: Sequence[CaseFiles], overwrite: bool, resume: bool = False) -> None:
    """Check that all files can be written, before the work starts.

    Args:
        cases: all scans; no two may write the same file, and none may overwrite a scan.
        mine: those of this process, whose files must not exist unless `overwrite`.
        resume: accept results with a damaged sidecar, or without one but with their table; they are made again.

    Raises:
        OutputError: if one cannot be written.
    """
    seen: dict[Path, Path] = {}
    inputs = {os.path.realpath(split(case.input)[0]) for case in cases}  # of a link to itself, too
    for case in cases:
        place = split(case.input)[0]
        for target in case:
            if target in seen:
                raise OutputError(f"{case.input} and {seen[target]} would both write {target}; use two output folders.")
            seen[target] = case.input
            if len(os.fsencode(target.name)) > 255:
                raise OutputError(f"{target}: the name is too long for a file; rename the input.")
            if target.exists() and place.exists() and target.samefile(place):
                raise OutputError(f"{target}: is the input itself; choose another --output folder.")
            if os.path.realpath(target) in inputs:
                raise OutputError(f"{target}: is one of the inputs; choose another --output folder.")
    check_targets((target for case in mine for target in case), overwrite)
    for case in mine:
        for files in case.levels.values():
            if files.labels.exists() and not _is_own(files, resume):
                raise OutputError(
                    f"{files.labels}: was not made by diffdiscover3d, as {files.sidecar.name} does not name it; "
                    "choose another --output folder."
                )


def _is_own(files: LevelFiles, incomplete: bool) -> bool:
    """Whether a label map was written by this program; with `incomplete`, its sidecar may be damaged or missing."""
    try:
        written = read_json(files.sidecar)
    except FileNotFoundError:
        return incomplete and _is_own_table(files.table)
    except (OSError, ValueError):
        return incomplete
    return "diffdiscover3d" in written if isinstance(written, dict) else incomplete


def _is_own_table(path: Path) -> bool:
    """Whether a table has columns that only this program writes."""
    try:
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            columns = file.readline(4096).rstrip("\n").split("\t")
    except (OSError, ValueError):
        return False
    return {"index", "color", "voxels", "mean_intensity"} <= set(columns)


def is_finished(case: CaseFiles, provenance: dict[int | None, dict], sha256: str) -> bool:
    """Whether all files of a scan exist and were made from this very input.

    The sidecar of a level records the sha256 of its other files, so files of two runs, or truncated ones, are found.

    Args:
        case: the scan and its files.
        provenance: by level, what its sidecar would record about model and arguments.
        sha256: of the scan's file.

    Raises:
        ModelError: if a result is of another model or other arguments.
    """
    if not all(target.exists() for target in case):
        return False
    for level, files in case.levels.items():
        try:
            written = read_json(files.sidecar)
        except (OSError, ValueError):
            return False
        if not isinstance(written, dict):
            return False
        expected = json.loads(json.dumps(provenance[level]))
        for key in ("model", "arguments"):
            if not isinstance(written.get(key), dict):
                return False
            old, new = ({k: v for k, v in d[key].items() if k != "device"} for d in (written, expected))
            if old != new:
                raise ModelError(
                    f"{files.sidecar}: was made with another {key.rstrip('s')}; "
                    "use --overwrite instead of --resume, or choose another --output folder."
                )
        try:
            if written["input"]["sha256"] != sha256 or written["outputs"] != hash_outputs(files):
                return False
        except (KeyError, TypeError, OSError, InputError):
            return False
    return True


def hash_outputs(files: LevelFiles, folder: Path | None = None) -> dict[str, str]:
    """The sha256 of the files of a level but its sidecar, by name; of a Zarr store, of its files in order.

    Args:
        folder: where they are, if they have not been moved into place yet.
    """
    paths = [path for path in vars(files).values() if path is not None and path != files.sidecar]
    return {path.name: volume_sha256(path if folder is None else folder / path.name) for path in paths}


def shard(cases: Sequence[CaseFiles], share: str | None = None) -> list[CaseFiles]:
    """The cases of this process, if `accelerate launch` or torchrun started several; otherwise all.

    Args:
        share: "i/n": only the i-th of n shares is divided among the processes.

    Raises:
        ValueError: as [`rank_and_world_size`] and [`parse_share`].
    """
    index, count = (0, 1) if share is None else parse_share(share)
    rank, world = rank_and_world_size()
    return list(cases[index::count][rank::world])


def parse_share(share: str) -> tuple[int, int]:
    """The index, from 0, and the number of the shares in "i/n", with i from 1 to n.

    Raises:
        ValueError: if it is anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"`share` must be i/n with i in 1..n, such as 3/8, got {share!r}.")
    return int(match[1]) - 1, int(match[2])
