"""What the commands beside `segment` write: features of a scan, sampled volumes, synthetic cells."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.nifti import NiftiVolume, read_nifti, write_like, write_volume
from diffdiscover3d.data.synthetic import LEVEL_PARTS, SPLITS
from diffdiscover3d.data.synthetic import synthesize as make_cells
from diffdiscover3d.files import check_targets, staged_folder
from diffdiscover3d.hub import DEFAULT_MODEL, load_teacher
from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline, make_ddim_scheduler
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.reporting.plots import components_as_rgb
from diffdiscover3d.segmentation import choose_device, stem


def extract_features(
    path: str | Path,
    output: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    stages: Sequence[int] = (1, 2, 3),
    timestep: int = 25,
    num_noise: int = 1,
    upsample: bool = False,
    seed: int = 0,
    device: str = "auto",
    preview: bool = False,
    overwrite: bool = False,
    **reading,
) -> list[Path]:
    """Write `<stem>_stage<N>.nii.gz` for each stage: (h, w, d, channels) float32, its affine laying it on the scan.

    Without `upsample` the features keep their own coarse grid, whose affine has the larger voxels.

    Args:
        preview: also write `<stem>_features.png`: the scan, and the first three principal components of every stage
            as red, green and blue.
        reading: `volume`, `nan_to_zero`, `ignore_affine` of [`read_nifti`].

    Raises:
        InputError, OutputError, ModelError, NetworkError: see their descriptions.
        ValueError: for an unknown device, or a timestep or stage out of range.
    """
    path, output = Path(path), Path(output)
    targets = [output / f"{stem(path)}_stage{stage}.nii.gz" for stage in stages]
    picture = [output / f"{stem(path)}_features.png"] if preview else []
    check_targets([*targets, *picture], overwrite)
    place = choose_device(device)
    scan = read_nifti(path, **reading)
    pipeline = load_teacher(model).to(place)
    generator = torch.Generator().manual_seed(seed)
    found = pipeline(scan.data, timestep, stages, generator, num_noise, upsample)
    with staged_folder(output) as folder:
        for target, features in zip(targets, found.features, strict=True):
            array = np.moveaxis(features[0].cpu().numpy(), 0, -1)
            write_like(folder / target.name, array, _on_grid(scan, array.shape[:3], found.extent))
        for target in picture:
            save_slices(
                folder / target.name,
                [scan.data, *(_rgb_on_scan(f, found.extent, scan.data.shape) for f in found.features)],
                spacing_mm=scan.spacing_mm,
                titles=["scan", *(f"stage {stage}" for stage in stages)],
            )
    return [*targets, *picture]


def _rgb_on_scan(features: torch.Tensor, extent: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """(3, H, W, D) principal components of (1, C, h, w, d) features, laid over the scan with blocky voxels."""
    rgb = components_as_rgb(features[0].cpu().numpy())
    for axis, (size, span, count) in enumerate(zip(rgb.shape[1:], extent, shape, strict=True), start=1):
        # corners aligned: voxel i of the scan lies at i * (size - 1) / (span - 1) of the features
        places = np.round(np.arange(count) * (size - 1) / max(span - 1, 1)).astype(int)
        rgb = np.take(rgb, np.clip(places, 0, size - 1), axis=axis)
    return rgb


def generate_volumes(
    output: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    count: int = 1,
    grid: Sequence[int] | None = None,
    steps: int | None = None,
    sampler: str = "ddim",
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Write `sample-NNN.nii.gz` for each sampled volume (float32 in [0, 1], 1 mm) and `samples.png`.

    Raises:
        OutputError, ModelError, NetworkError: see their descriptions.
        ValueError: for an unknown sampler or device, or a grid that is neither one nor three integers.
    """
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"`sampler` must be ddim or ddpm, got {sampler!r}.")
    if grid is not None and len(grid) not in (1, 3):
        raise ValueError(f"`grid` must be one integer or three, got {list(grid)}.")
    targets = [Path(output) / f"sample-{i:03d}.nii.gz" for i in range(count)]
    picture = Path(output) / "samples.png"
    check_targets([*targets, picture], overwrite)
    teacher = load_teacher(model)
    scheduler = teacher.scheduler
    if sampler == "ddim":
        scheduler = make_ddim_scheduler(scheduler)
        steps = min(50, scheduler.config.num_train_timesteps) if steps is None else steps
    pipeline = VolumeGenerationPipeline(teacher.unet, scheduler).to(choose_device(device))
    pipeline.set_progress_bar_config(disable=not progress)
    volumes = []
    with staged_folder(output) as folder:
        for i, target in enumerate(targets):  # a seed for each: sample 3 is the same however many are asked for
            generator = torch.Generator().manual_seed(seed + i)
            size = None if grid is None else tuple(grid) if len(grid) == 3 else grid[0]
            volumes.append(pipeline(size, 1, steps, generator).volumes[0, 0].cpu().numpy())
            write_volume(folder / target.name, volumes[-1])
        save_slices(folder / picture.name, volumes[:8])
    return [*targets, picture]


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


def _on_grid(scan: NiftiVolume, grid: tuple[int, ...], extent: Sequence[int]) -> NiftiVolume:
    """A description of `grid` laid over the scan so that the corner voxels' centres coincide with the extent's."""
    scale = [(e - 1) / (n - 1) if n > 1 else float(e) for e, n in zip(extent, grid, strict=True)]
    affine = scan.affine @ np.diag([*scale, 1.0])
    template = NiftiVolume(scan.data, affine, scan.header.copy(), np.array([[0, 1], [1, 1], [2, 1]], dtype=float))
    template.header.set_sform(affine, int(scan.header["sform_code"]) or 1)
    template.header.set_qform(None, 0)
    template.header["pixdim"][1:4] = template.spacing_mm
    return template
