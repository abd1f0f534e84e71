"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    inputs: Annotated[
        list[str], typer.Argument(metavar="SCAN...", help="Scans that were segmented: files or folders.")
    ],
    labels: Annotated[
        list[Path] | None,
        typer.Option("--labels", help="Label map of a single scan; repeatable (default: its *_dseg files)."),
    ] = None,
    parts: Annotated[
        Path | None, typer.Option("--parts", help="Folder of the label maps (default: beside each scan).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the pages (default: beside the label maps).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    volume: Annotated[int | None, typer.Option("--volume", help="Which volume of a 4-D file, from 0.")] = None,
    nan_to_zero: Annotated[bool, typer.Option("--nan-to-zero", help="Put 0 for NaN and Inf voxels.")] = False,
    ignore_affine: Annotated[bool, typer.Option("--ignore-affine", help="Go on where the affine is unusable.")] = False,
) -> None:
    """Write a page per scan with a 3D viewer of its parts, and an index of several; they open without a network."""
    from diffdiscover3d.report import make_reports

    reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
    for path in make_reports(inputs, labels=labels, parts=parts, output=output, overwrite=overwrite, **reading):
        print(path)
