"""Validation of a dataset before training, distributed over the processes."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from diffdiscover3d.errors import DiffDiscoverError
from diffdiscover3d.utils.terminal import printable

logger = logging.getLogger("diffdiscover3d")
_SHOWN = 10


def read_all(volumes: Sequence[dict], accelerator: Accelerator) -> None:
    """Read every volume once, so that unreadable files are reported before training starts, and log their notes.

    The shapes are stored in `volumes.shapes`, so that no process has to read all files to determine them. Datasets
    that already provide their shapes do not read from files and are skipped.

    Raises:
        DiffDiscoverError: the first error, on every process.
    """
    if not hasattr(volumes, "shapes") or volumes.shapes is not None:
        return
    rank, processes = accelerator.process_index, accelerator.num_processes
    for line in volumes.left_out:
        logger.info("%s", printable(line))
    logger.info("reading %d volumes", len(volumes))
    shapes: dict[int, tuple[int, ...]] = {}
    error: DiffDiscoverError | None = None
    for index in range(rank, len(volumes), processes):
        try:
            shapes[index] = tuple(volumes[index]["volume"].shape[1:])
        except DiffDiscoverError as problem:
            error = problem
            break
    notes = {volumes.paths[index].name: lines for index, lines in volumes.notes.items() if lines}
    found = gather_object([(shapes, error, notes)])
    errors = [e for _, e, _ in found if e is not None]
    if errors:
        raise errors[0]
    merged = {index: shape for part, _, _ in found for index, shape in part.items()}
    _log_notes({name: lines for _, _, part in found for name, lines in part.items()})
    volumes.shapes = [merged[index] for index in range(len(volumes))]


def _log_notes(notes: dict[str, list[str]]) -> None:
    """Log what is unusual about the first volumes, and about how many more."""
    for name, lines in list(notes.items())[:_SHOWN]:
        for line in lines:
            logger.info("%s: note: %s", printable(name), line)
    if len(notes) > _SHOWN:
        logger.info("%d more volumes have notes", len(notes) - _SHOWN)
