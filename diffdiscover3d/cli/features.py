"""The commands `features` and `generate`, which use the diffusion model alone."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device, Model, OutputFolder, Overwrite, Seed, with_reading_options
from diffdiscover3d.utils.terminal import say


@with_reading_options()
def features(
    input: Annotated[str, typer.Argument(help="A volume.")],
    output: OutputFolder = Path("."),
    model: Model = "synthetic-regular",
    stage: Annotated[
        list[int] | None, typer.Option(min=1, help="Decoder stage, 1 is the coarsest; repeatable.")
    ] = None,
    timestep: Annotated[int, typer.Option(help="Noise step t.")] = 25,
    num_noise: Annotated[int, typer.Option(help="Noise draws to average over.")] = 1,
    upsample: Annotated[bool, typer.Option("--upsample", help="Resample the features to the scan's grid.")] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Also write a picture: three principal components as colours.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    *,
    reading: dict,
) -> None:
    """Write the diffusion features of a scan, one 4-D NIfTI per decoder stage, aligned with the scan."""
    from diffdiscover3d.segmentation.preflight import refuse_early

    refuse_early([input], device, **reading)
    from diffdiscover3d.workflows.features import extract_features

    paths = extract_features(
        input,
        output,
        model=model,
        stages=tuple(stage or (1, 2, 3)),
        timestep=timestep,
        num_noise=num_noise,
        upsample=upsample,
        seed=seed,
        device=device,
        preview=preview,
        overwrite=overwrite,
        **reading,
    )
    for path in paths:
        say(path)


def generate(
    output: OutputFolder = Path("samples"),
    model: Model = "synthetic-regular",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of volumes.")] = 1,
    grid: Annotated[
        list[int] | None, typer.Option(min=2, help="Voxels: once for a cube, or three times (default: the model's).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps (default: all for ddpm, 50 for ddim).")
    ] = None,
    sampler: Annotated[str, typer.Option(help="ddim (few steps) or ddpm (all of them).")] = "ddim",
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Sample new volumes from a diffusion model and write them as NIfTI, with a picture."""
    from diffdiscover3d.workflows.generate import generate_volumes

    for path in generate_volumes(
        output,
        model=model,
        count=count,
        grid=grid,
        steps=steps,
        sampler=sampler,
        seed=seed,
        device=device,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    ):
        say(path)
