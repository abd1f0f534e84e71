"""Loading of volumes for training and evaluation, by dataset name or from files."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from diffdiscover3d.data.datasets import synthetic
from diffdiscover3d.data.datasets.brats import BraTSOptions, is_brats
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.data.datasets.folder import VolumeFolder
from diffdiscover3d.data.formats.nifti.header import check_reachable
from diffdiscover3d.data.transforms import min_max_normalize
from diffdiscover3d.data.working_grid import WorkingGrid, spacing_on
from diffdiscover3d.errors import DiffDiscoverError, InputError, NetworkError, first_line

# "synthetic" concatenates the volumes of all variants
_VARIANTS_OF = {f"synthetic-{variant}": (variant,) for variant in synthetic.VARIANTS} | {
    "synthetic": synthetic.VARIANTS
}
SYNTHETIC_NAMES = tuple(_VARIANTS_OF)

_HUB_PREFIX = "hf://datasets/"


class SyntheticVolumes:
    """Sequence of the synthetic cells of a split, as many as in the paper.

    Items are `{"volume": (1, 50, 50, 50) float32 in [0, 1], "labels": (3, 50, 50, 50) uint8, "name": str}`.

    Attributes:
        shapes: shapes of the volumes, available without generating them.
    """

    def __init__(self, variant: str, split: str):
        if split not in synthetic.SPLITS:
            raise ValueError(f"`split` must be one of {tuple(synthetic.SPLITS)}, got {split!r}.")
        self.variant, self.split = variant, split
        self.shapes = [synthetic.SHAPE] * len(self)
        self._cache: dict[int, dict] = {}

    def __len__(self) -> int:
        return synthetic.SPLITS[self.split]

    def fingerprint(self) -> str:
        """Variant, split and generator version."""
        return f"synthetic-{self.variant} {self.split} version {synthetic.GENERATOR_VERSION}"

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._cache:
            sample = synthetic.synthesize(self.variant, self.split, index)
            self._cache[index] = {
                "volume": min_max_normalize(torch.from_numpy(sample.volume)[None]),
                "labels": torch.from_numpy(sample.labels),
                "name": f"{self.variant}-{self.split}-{index:03d}",
            }
        return self._cache[index]


class JoinedVolumes(Sequence):
    """Concatenation of the synthetic cells of several variants.

    Attributes:
        shapes: shapes of the volumes, available without generating them.
    """

    def __init__(self, datasets: Sequence[SyntheticVolumes]):
        self.datasets = list(datasets)
        self.shapes = [shape for dataset in self.datasets for shape in dataset.shapes]

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def fingerprint(self) -> str:
        """The fingerprints of the concatenated datasets, in order."""
        return ", ".join(dataset.fingerprint() for dataset in self.datasets)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for dataset in self.datasets:
            if index < len(dataset):
                break
            index -= len(dataset)
        return dataset[index]


def load_volumes(
    name_or_path: str,
    split: str = "train",
    brats: BraTSOptions | None = None,
    working_grid: WorkingGrid | None = None,
    **reading,
) -> Sequence[dict]:
    """Load a dataset of volumes.

    Args:
        name_or_path: "synthetic-regular", "synthetic-irregular", "synthetic" (both), the folder of a BraTS edition
            (detected automatically), a Hub dataset as `hf://datasets/user/name`, or a folder, glob pattern, text list
            or file of volumes.
        split: "train", "validation" or "test", for a named dataset or BraTS. Other files have no splits; all of them
            are returned.
        brats: preprocessing of BraTS; default: as in the paper.
        working_grid: to which volumes of files are resampled; named datasets, BraTS and Hub datasets keep their grids.
        reading: how files are read, see [`VolumeFolder`]; not for named, BraTS or Hub datasets.

    Returns:
        A sequence of dicts with "volume", (1, H, W, D) float32 in [0, 1], "name", and for synthetic data "labels".

    Raises:
        InputError: if the dataset or the files do not exist.
        ValueError: if the split does not exist, or `reading` is given for a dataset without files to choose.
    """
    if reading and (name_or_path.startswith(_HUB_PREFIX) or has_splits(name_or_path)):
        listed = ", ".join(f"`{name}`" for name in reading)
        raise ValueError(
            f"{listed} must be left out for {name_or_path}: only folders, globs and lists of files take it."
        )
    if name_or_path in SYNTHETIC_NAMES:
        variants = [SyntheticVolumes(variant, split) for variant in _VARIANTS_OF[name_or_path]]
        return variants[0] if len(variants) == 1 else JoinedVolumes(variants)
    if name_or_path.startswith(_HUB_PREFIX):
        return _load_from_hub(name_or_path.removeprefix(_HUB_PREFIX), split)
    check_reachable(Path(name_or_path))
    if is_brats(name_or_path):
        return BraTSVolumes(name_or_path, split, brats)
    try:
        return VolumeFolder(name_or_path, working_grid=working_grid, **reading)
    except InputError as error:
        raise InputError(f"{error} Named datasets: {', '.join(SYNTHETIC_NAMES)}.") from error


def _load_from_hub(repo_id: str, split: str) -> Sequence[dict]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{repo_id}: a Hub dataset needs: pip install 'diffdiscover3d[datasets]'.") from error
    from diffdiscover3d.data.datasets.builders import as_training_volumes

    try:
        return as_training_volumes(datasets.load_dataset(repo_id, split=split))
    except (OSError, ValueError) as error:
        if isinstance(error, DiffDiscoverError):
            raise
        raise NetworkError(f"{repo_id}: cannot be loaded from the Hub: {first_line(error)}") from error


def has_splits(name_or_path: str) -> bool:
    """Whether a dataset has training, validation and test splits."""
    return name_or_path in SYNTHETIC_NAMES or is_brats(name_or_path)


def grid_shapes(volumes: Sequence[dict]) -> list[tuple[int, ...]]:
    """The shapes of all volumes, read from the volumes if the dataset does not provide them."""
    known = getattr(volumes, "shapes", None)
    return known if known is not None else [tuple(volumes[i]["volume"].shape[1:]) for i in range(len(volumes))]


def common_grid(volumes: Sequence[dict]) -> tuple[int, int, int] | None:
    """The common shape of all volumes, or `None` if they differ."""
    shapes = set(grid_shapes(volumes))
    return shapes.pop() if len(shapes) == 1 else None


def grid_spacing(volumes: Sequence[dict], grid: Sequence[int] | None = None) -> tuple[float, float, float]:
    """The median edge lengths of the volumes' voxels, 1 where they are unknown.

    Args:
        grid: to which the volumes are resampled with their extent kept; `None` if they are not.
    """
    if not hasattr(volumes, "working_grid"):  # only files have voxel sizes that differ
        return (1.0, 1.0, 1.0)
    found = [spacing_on(grid or shape, shape, volumes[i]["spacing_mm"]) for i, shape in enumerate(grid_shapes(volumes))]
    return tuple(statistics.median(edges) for edges in zip(*found, strict=True))
