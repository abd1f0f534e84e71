"""Synthetic volumes and their true labels as NIfTI files: nested cells, and brain phantoms."""

from pathlib import Path

import numpy as np

from diffdiscover3d.data.datasets.brain_phantom import PHANTOM_LEVELS, PHANTOM_VARIANT, SPACING_MM, brain_phantom
from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS, SPLITS
from diffdiscover3d.data.datasets.synthetic import synthesize as make_cells
from diffdiscover3d.data.formats.nifti.reading import write_volume
from diffdiscover3d.utils.files import check_targets
from diffdiscover3d.utils.staging import staged_folder


def write_synthetic(
    output: str | Path,
    *,
    variant: str = "regular",
    split: str = "test",
    count: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write synthetic volumes: `<name>.nii.gz` and its true labels `<name>_level-<L>_truth.nii.gz`.

    Args:
        variant: "regular" or "irregular" cells (levels 1 to 3), or "brain-phantom" (level 1: background, brain; level
            2: background, brain, lesion).

    Returns:
        The paths of the volumes.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {tuple(SPLITS)}, got {split!r}.")
    phantoms = variant == PHANTOM_VARIANT
    levels = PHANTOM_LEVELS if phantoms else LEVEL_PARTS
    prefix = variant if phantoms else f"synthetic-{variant}"
    affine = np.diag([SPACING_MM] * 3 + [1.0]) if phantoms else None
    names = [f"{prefix}-{split}-{i:03d}" for i in range(SPLITS[split] if count is None else count)]
    targets = [Path(output) / f"{name}.nii.gz" for name in names]
    level_targets = [{x: Path(output) / f"{name}_level-{x}_truth.nii.gz" for x in levels} for name in names]
    check_targets([*targets, *(path for paths in level_targets for path in paths.values())], overwrite)
    with staged_folder(output, overwrite) as folder:
        for index, (target, paths) in enumerate(zip(targets, level_targets, strict=True)):
            sample = brain_phantom(split, index) if phantoms else make_cells(variant, split, index)
            write_volume(folder / target.name, sample.volume, affine)
            for level, path in paths.items():
                write_volume(folder / path.name, sample.labels[level - 1], affine, labels=True)
    return targets
