"""Read a whole dataset once before anything is trained on it, the files shared out among the processes."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from diffdiscover3d.errors import DiffDiscoverError

logger = logging.getLogger("diffdiscover3d")


def read_all(volumes: Sequence[dict], accelerator: Accelerator) -> None:
    """Read every volume whole, so that a bad one is known before the training and not after hours of it.

    The shapes found are kept in `volumes.shapes`, which spares every process from reading all files for them. A
    dataset that knows its shapes already is not of files, and is left alone.

    Raises:
        DiffDiscoverError: the first error found, on every process.
    """
    if not hasattr(volumes, "shapes") or volumes.shapes is not None:
        return
    rank, processes = accelerator.process_index, accelerator.num_processes
    logger.info("reading %d volumes", len(volumes))
    shapes: dict[int, tuple[int, ...]] = {}
    error: DiffDiscoverError | None = None
    for index in range(rank, len(volumes), processes):
        try:
            shapes[index] = tuple(volumes[index]["volume"].shape[1:])
        except DiffDiscoverError as problem:
            error = problem
            break
    found = gather_object([(shapes, error)])
    errors = [e for _, e in found if e is not None]
    if errors:
        raise errors[0]
    together = {index: shape for part, _ in found for index, shape in part.items()}
    volumes.shapes = [together[index] for index in range(len(volumes))]
