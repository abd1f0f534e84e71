"""The command `discover`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device, Include, Quiet, Series, with_reading_options
from diffdiscover3d.utils.terminal import say


@with_reading_options("resolution", "series")
def discover(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Your scans: a folder, glob or text list.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all files.")] = Path("discovered"),
    preset: Annotated[
        str, typer.Option(help="quick (a first look within minutes), standard (hours on a CPU), or paper (a GPU).")
    ] = "standard",
    levels: Annotated[
        int, typer.Option(min=1, max=3, help="Number of levels: 2, 4, 8 parts, each nested in the level before.")
    ] = 3,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    spacing: Annotated[
        str | None, typer.Option(help="Voxel size to work on, as 5,5,40nm (default: chosen from the scans).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an earlier run.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of the trainings.")] = False,
    *,
    reading: dict,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=0, help="Resolution of a pyramid, 0 the finest.")
    ] = None,
    series: Series = None,
    include: Include = None,
    quiet: Quiet = False,
) -> None:
    """Train on your own scans without labels, then segment them and write reports."""
    from diffdiscover3d.data.datasets.listing import describe_left_out, look_into
    from diffdiscover3d.errors import DiffDiscoverError, OutputError

    # refused at once, before anything slow is imported
    if (output / "plan.json").exists() and not resume:
        raise OutputError(f"{output}: holds an earlier run; --resume continues it, or choose another --output folder.")
    contents = look_into(folder, include or (), series)
    if not quiet:
        for line in describe_left_out(contents):
            say(line, error=True)
    from diffdiscover3d.workflows.discover import discover as run

    errors: list[DiffDiscoverError] = []

    def failed(error: DiffDiscoverError) -> None:
        errors.append(error)
        say(f"error: {error}", error=True)

    try:
        run(
            folder,
            output,
            preset=preset,
            levels=levels,
            device=device,
            seed=seed,
            spacing=spacing,
            **reading,
            resolution=resolution,
            series=series,
            include=include or (),
            resume=resume,
            progress=not quiet,
            verbose=verbose,
            on_step=lambda line: None if quiet else say(line),
            on_error=failed,
        )
    except KeyboardInterrupt:
        command = ["diffdiscover3d", *sys.argv[1:], *([] if resume else ["--resume"])]
        say(f"interrupted; go on with: {shlex.join(command)}", error=True)
        raise
    say(output / "index.html")
    if errors:
        raise typer.Exit(errors[0].exit_code)
