"""The values that the steps of a segmentation exchange: a job, the parts found, the files written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffdiscover3d.data.working_grid import WorkingGrid
from diffdiscover3d.reporting.parts import PartStatistics
from diffdiscover3d.segmentation.finish import Finish
from diffdiscover3d.segmentation.outputs import CaseFiles, Extras, LevelFiles
from diffdiscover3d.utils.progress import ProgressBar

if TYPE_CHECKING:
    from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel


@dataclass(frozen=True)
class ScanJob:
    """One scan to be segmented, in memory or out of core.

    Attributes:
        case: the scan's path, and the files to write for it.
        networks: by level, the coarsest first.
        provenance: by level, what its sidecar records about model and arguments.
        extras: what is written on request.
        order: number parts as the "model" does, or by "size".
        fast: segment at half the resolution.
        working_grid: to which the scan is resampled first; `None` for its own grid.
        read_seconds: how long reading the scan took.
        stages: the progress bar.
        neurological: pictures have the patient's left on the left.
        overwrite: replace results that exist.
        finish: what is done with the parts that were found.
        domain, model: what is known of the scans that the model was trained on, and its name.
    """

    case: CaseFiles
    networks: "dict[int | None, StructureDiscoveryModel]"
    provenance: dict[int | None, dict]
    extras: Extras
    order: str
    fast: bool
    working_grid: WorkingGrid | None
    read_seconds: float
    stages: ProgressBar
    neurological: bool = False
    overwrite: bool = False
    domain: dict | None = None
    model: str = "the model"
    finish: Finish = field(default_factory=Finish)


@dataclass(frozen=True)
class SegmentedFile:
    """One input and what was written for it; paths are `None` for what was not requested.

    Attributes:
        input, preview, tree, report: paths.
        labels, sidecar: paths of the first level.
        levels: the files of every level.
        fractions: share of the voxels in each part of the first level.
        notes: sentences about anything unusual in the input.
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


class FoundParts(Protocol):
    """The parts of one level of a scan, numbered as in the results; in memory or on disk.

    Attributes:
        num_parts: K.
        recorded: further entries of the sidecar.
    """

    num_parts: int
    recorded: dict

    def write(self, labels: Path, probabilities: Path | None) -> None:
        """Write the label map and, on request, the probabilities, on the grid of the scan's file; to be called once."""

    def statistics(self, topology: bool) -> list[PartStatistics]:
        """Measure every part.

        Args:
            topology: also count components and find neighbours.
        """

    def middle_slices(self) -> list[np.ndarray]:
        """The part numbers in the middle plane across each canonical axis."""

    def sample(self, picks: Sequence[np.ndarray]) -> np.ndarray:
        """(h, w, d) part numbers where the picked planes along the three canonical axes cross."""

    def count_pairs(self, coarser: "FoundParts") -> np.ndarray:
        """(K, K of the coarser level) voxels in every pair of parts."""


class PartFinder(Protocol):
    """Finds the parts of one scan, level by level, and gives views of the scan.

    Attributes:
        notes: sentences about anything unusual in the scan or its segmentation, so far.
    """

    notes: list[str]

    def find(self, level: int | None) -> FoundParts:
        """The parts of a level; levels must be requested in the order of the job's networks.

        Raises:
            MemoryLimitError: if the device's memory does not suffice.
        """

    def middle_slices(self) -> list[np.ndarray]:
        """The intensities in the middle plane across each canonical axis."""

    def shrink(self, grid: Sequence[int]) -> np.ndarray:
        """(h, w, d) float32 intensities on a coarser grid over the same extent."""

    def check_unchanged(self) -> None:
        """Raise an InputError if the scan's file has changed since it was hashed."""
