"""Write the diffusion features of a scan as NIfTI files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.formats.nifti.header import length_unit
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, write_like
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import stem
from diffdiscover3d.data.formats.units import IN_MM
from diffdiscover3d.hub.registry import DEFAULT_MODEL, load_teacher
from diffdiscover3d.pipelines.volumes import feature_affine
from diffdiscover3d.reporting.frames import frame_of
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.reporting.plots import components_as_rgb
from diffdiscover3d.segmentation.driver import choose_device
from diffdiscover3d.utils.files import check_targets
from diffdiscover3d.utils.staging import staged_folder


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
    """Write `<stem>_stage<N>.nii.gz` for each decoder stage: (h, w, d, channels) float32, aligned with the scan.

    Without `upsample` the features keep their own coarse grid, with larger voxels.

    Args:
        path: of the scan.
        output: folder for the files.
        model: an embedded model's name, a folder, or a Hub id.
        stages: decoder stages, 1 the coarsest.
        timestep: noise step t at which the features are extracted.
        num_noise: draws of noise to average over.
        upsample: resample the features to the scan's grid.
        seed: of the noise.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        preview: also write `<stem>_features.png`: the scan, and the first three principal components of every stage
            as red, green and blue.
        reading: see [`read_volume`].

    Raises:
        InputError, OutputError, ModelError, NetworkError: see their descriptions.
        ValueError: for an unknown device, or a timestep or stage out of range.
    """
    path, output = Path(path), Path(output)
    targets = [output / f"{stem(path)}_stage{stage}.nii.gz" for stage in stages]
    picture = [output / f"{stem(path)}_features.png"] if preview else []
    check_targets([*targets, *picture], overwrite)
    place = choose_device(device)
    scan = read_volume(path, **reading)
    pipeline = load_teacher(model).to(place)
    generator = torch.Generator().manual_seed(seed)
    found = pipeline(scan.data, timestep, stages, generator, num_noise, upsample)
    with staged_folder(output, overwrite) as folder:
        for target, features in zip(targets, found.features, strict=True):
            array = np.moveaxis(features[0].cpu().numpy(), 0, -1)
            write_like(folder / target.name, array, _on_grid(scan, array.shape[:3], found.extent))
        for target in picture:
            save_slices(
                folder / target.name,
                [scan.data, *(_rgb_on_scan(f, found.extent, scan.data.shape) for f in found.features)],
                spacing_mm=scan.spacing_mm,
                titles=["scan", *(f"stage {stage}" for stage in stages)],
                frame=frame_of(scan.spacing_mm, scan.unit, scan.anatomical),
            )
    return [*targets, *picture]


def _rgb_on_scan(features: torch.Tensor, extent: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """(3, H, W, D) principal components of (1, C, h, w, d) features, by the nearest voxel."""
    rgb = components_as_rgb(features[0].cpu().numpy())
    for axis, (size, span, count) in enumerate(zip(rgb.shape[1:], extent, shape, strict=True), start=1):
        # with aligned corners, voxel i of the scan is at i * (size - 1) / (span - 1) of the features
        places = np.round(np.arange(count) * (size - 1) / max(span - 1, 1)).astype(int)
        rgb = np.take(rgb, np.clip(places, 0, size - 1), axis=axis)
    return rgb


def _on_grid(scan: NiftiVolume, grid: tuple[int, ...], extent: Sequence[int]) -> NiftiVolume:
    """A volume whose affine puts `grid` over the scan, the centres of corner voxels on those of the extent."""
    affine = feature_affine(scan.affine, grid, extent)
    template = NiftiVolume(scan.data, affine, scan.header.copy(), np.array([[0, 1], [1, 1], [2, 1]], dtype=float))
    per_mm = 1 / IN_MM[length_unit(scan.header)]
    template.header.set_sform(np.diag([per_mm] * 3 + [1]) @ affine, int(scan.header["sform_code"]) or 1)
    template.header.set_qform(None, 0)
    template.header["pixdim"][1:4] = np.array(template.spacing_mm) * per_mm
    return template
