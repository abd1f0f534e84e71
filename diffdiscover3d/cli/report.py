"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Include, Neurological, Overwrite, with_reading_options
from diffdiscover3d.utils.terminal import say


@with_reading_options()
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
    *,
    reading: dict,
    include: Include = None,
    neurological: Neurological = False,
) -> None:
    """Write an HTML report per scan with a 3D viewer of its parts, and an index of several; they need no network."""
    from diffdiscover3d.workflows.reports import make_reports

    for path in make_reports(
        inputs,
        labels=labels,
        parts=parts,
        output=output,
        overwrite=overwrite,
        neurological=neurological,
        include=include or (),
        on_note=lambda line: say(line, error=True),
        **reading,
    ):
        say(path)
