"""One job of the app: an upload is segmented as the command `segment` does it."""

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.app.sessions import Sessions
from diffdiscover3d.app.uploads import UNPACKED, arrange_uploads, check_size
from diffdiscover3d.data.datasets.brain_phantom import PHANTOM_VARIANT
from diffdiscover3d.data.formats.reading import open_source
from diffdiscover3d.errors import OUT_OF_MEMORY
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.job import SegmentedFile
from diffdiscover3d.workflows.synthesize import write_synthetic

# by the label of the button: variant of the synthetic volume, embedded model
DEMOS = {
    "Demo: cells": ("regular", "synthetic-regular"),
    "Demo: brain": (PHANTOM_VARIANT, "brain-flair"),
}


@dataclass(frozen=True)
class JobOptions:
    """What a visitor chooses; see the options of the same names of [`segment`].

    Attributes:
        inner: name of one of several arrays in an HDF5, npz or Zarr file.
    """

    model: str
    level: int | str | None = None
    fast: bool = False
    volume: int | None = None
    inner: str = ""
    voxel_size: str | None = None


@dataclass(frozen=True)
class JobResults:
    """What a job returns.

    Attributes:
        files: all files written: label maps first, then tables, sidecars and the report.
        report: the HTML page.
        parts: header and rows of the tables of parts of all levels, with the level in front.
        notes: sentences about anything unusual in the upload.
        seconds: from reading to writing.
    """

    files: list[Path]
    report: Path
    parts: tuple[list[str], list[list[str]]]
    notes: tuple[str, ...]
    seconds: float


def run_job(
    sessions: Sessions,
    session: str,
    uploads: Sequence[str | Path],
    options: JobOptions,
    *,
    device: str = "auto",
    max_bytes: int,
    on_progress: Callable[[float, str], None] = lambda share, operation: None,
) -> JobResults:
    """Segment the uploads of a session. Its results stay until its next job or its end.

    Args:
        sessions, session: of the app, and of the visitor's page.
        uploads: files of one volume, see [`arrange_uploads`].
        options: what the visitor chose.
        device: of [`segment`].
        max_bytes: limit of the uploads; an uncompressed volume may have [`UNPACKED`] times that.
        on_progress: progress callback of [`segment`].

    Raises:
        JobStoppedError: if the job was stopped, or the session has ended.
        InputError, OutputError, ModelError, NetworkError, MemoryLimitError: as [`segment`].
    """
    held = sessions.hold(session, uploads)
    with sessions.job(session) as folder:

        def step(share: float, operation: str) -> None:
            sessions.check_wanted(session, folder)
            on_progress(share, operation)

        source = folder / "upload"
        volume = arrange_uploads(held, source, max_bytes, options.inner)
        reading = {"volume": options.volume, "voxel_size": options.voxel_size}
        with open_source(volume, **reading) as file:
            check_size(file.reading_bytes, max_bytes * UNPACKED)
        (result,) = segment(
            str(volume),
            folder / "parts",
            model=options.model,
            level=options.level,
            device=device,
            fast=options.fast,
            report=True,
            on_progress=step,
            **reading,
        )
        shutil.rmtree(source, ignore_errors=True)
        return JobResults(_files(result), result.report, _parts(result), result.notes, result.seconds)


def make_demo(sessions: Sessions, variant: str) -> Path:
    """A synthetic volume for visitors without one; it is written once."""
    folder = sessions.demos / variant
    if not folder.exists():
        write_synthetic(folder, variant=variant, count=1)
    return next(path for path in sorted(folder.glob("*.nii.gz")) if "_truth" not in path.name)


def plain_message(error: BaseException, root: Path) -> str:
    """An error as one line without the folders of the app."""
    text = " ".join(str(error).split()) or OUT_OF_MEMORY
    return _without_folders(text, root)


def _without_folders(text: str, root: Path) -> str:
    """Names of files instead of their paths below the root."""
    words = text.split(f"{root}/")
    shown = [words[0]]
    for word in words[1:]:
        # what follows is results/job-XXXX/upload/NAME or HASH/NAME
        parts = word.split("/")
        depth = 3 if parts[:1] == ["results"] else 1
        shown.append("/".join(parts[depth:]) if len(parts) > depth else parts[-1])
    return "".join(shown)


def _files(result: SegmentedFile) -> list[Path]:
    levels = result.levels.values()
    files = [*(level.labels for level in levels), *(level.table for level in levels)]
    return [path for path in (*files, *(level.sidecar for level in levels), result.tree, result.report) if path]


def _parts(result: SegmentedFile) -> tuple[list[str], list[list[str]]]:
    header: list[str] = []
    rows = []
    for level, files in result.levels.items():
        with open(files.table, encoding="utf-8", newline="") as file:
            first, *lines = csv.reader(file, delimiter="\t")
        header = ["level", *first] if len(result.levels) > 1 else first
        rows += [[str(level), *line] if len(result.levels) > 1 else line for line in lines]
    return header, rows
