"""Sample new volumes from a diffusion model into NIfTI files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffdiscover3d.data.formats.nifti.reading import write_volume
from diffdiscover3d.hub.registry import DEFAULT_MODEL, load_teacher
from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline, make_ddim_scheduler
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.segmentation.driver import choose_device
from diffdiscover3d.utils.files import check_targets
from diffdiscover3d.utils.staging import staged_folder


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
    with staged_folder(output, overwrite) as folder:
        for i, target in enumerate(targets):  # one seed each, so that a sample does not depend on the count
            generator = torch.Generator().manual_seed(seed + i)
            size = None if grid is None else tuple(grid) if len(grid) == 3 else grid[0]
            volumes.append(pipeline(size, 1, steps, generator).volumes[0, 0].cpu().numpy())
            write_volume(folder / target.name, volumes[-1])
        save_slices(folder / picture.name, volumes[:8])
    return [*targets, picture]
