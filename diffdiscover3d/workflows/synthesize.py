"""Synthetic cells and their true labels as NIfTI files."""

from pathlib import Path

from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS, SPLITS
from diffdiscover3d.data.datasets.synthetic import synthesize as make_cells
from diffdiscover3d.data.formats.nifti.reading import write_volume
from diffdiscover3d.utils.files import check_targets, staged_folder


def write_synthetic(
    output: str | Path,
    *,
    variant: str = "regular",
    split: str = "test",
    count: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write synthetic cells: `<name>.nii.gz` and its true labels `<name>_level-<L>_dseg.nii.gz`.

    Returns:
        The paths of the volumes.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {tuple(SPLITS)}, got {split!r}.")
    names = [f"synthetic-{variant}-{split}-{i:03d}" for i in range(SPLITS[split] if count is None else count)]
    targets = [Path(output) / f"{name}.nii.gz" for name in names]
    level_targets = [{x: Path(output) / f"{name}_level-{x}_dseg.nii.gz" for x in LEVEL_PARTS} for name in names]
    check_targets([*targets, *(path for paths in level_targets for path in paths.values())], overwrite)
    with staged_folder(output) as folder:
        for index, (target, paths) in enumerate(zip(targets, level_targets, strict=True)):
            sample = make_cells(variant, split, index)
            write_volume(folder / target.name, sample.volume)
            for level, path in paths.items():
                write_volume(folder / path.name, sample.labels[level - 1], labels=True)
    return targets
