"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import (
    IgnoreAffine,
    Include,
    MissingChunks,
    NanToZero,
    Neurological,
    Overwrite,
    Resolution,
    Series,
    VolumeNumber,
    VoxelSize,
)


def report(
    inputs: Annotated[list[str], typer.Argument(metavar="SCAN...", help="Segmented scans: files or folders.")],
    labels: Annotated[
        list[Path] | None,
        typer.Option("--labels", help="Label map of a single scan; repeatable (default: its *_dseg files)."),
    ] = None,
    parts: Annotated[
        Path | None, typer.Option("--parts", help="Folder of the label maps (default: beside each scan).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the reports (default: beside the label maps).")
    ] = None,
    overwrite: Overwrite = False,
    volume: VolumeNumber = None,
    nan_to_zero: NanToZero = False,
    ignore_affine: IgnoreAffine = False,
    series: Series = None,
    resolution: Resolution = 0,
    missing_chunks: MissingChunks = False,
    voxel_size: VoxelSize = None,
    include: Include = None,
    neurological: Neurological = False,
) -> None:
    """Write an HTML report per scan with a 3D viewer of its parts, and an index of several; they need no network."""
    from diffdiscover3d.utils.terminal import say
    from diffdiscover3d.workflows.reports import make_reports

    reading = {
        "volume": volume,
        "nan_to_zero": nan_to_zero,
        "ignore_affine": ignore_affine,
        "resolution": resolution,
        "missing_chunks": missing_chunks,
        "voxel_size": voxel_size,
    }
    for path in make_reports(
        inputs,
        labels=labels,
        parts=parts,
        output=output,
        overwrite=overwrite,
        neurological=neurological,
        include=include or (),
        series=series,
        tell=lambda line: say(line, error=True),
        **reading,
    ):
        say(path)
