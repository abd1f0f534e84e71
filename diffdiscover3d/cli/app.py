"""The command line: parse, call one function, print. Heavy imports are inside the commands."""

import contextlib
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from diffdiscover3d.cli import evaluate as scores
from diffdiscover3d.cli.brats import evaluate_brats
from diffdiscover3d.cli.datasets import import_authors_archive, synthesize
from diffdiscover3d.cli.discover import discover
from diffdiscover3d.cli.doctor import doctor
from diffdiscover3d.cli.features import features, generate
from diffdiscover3d.cli.hub import pull, push
from diffdiscover3d.cli.listing import list_contents
from diffdiscover3d.cli.models import convert_authors_checkpoint, list_models
from diffdiscover3d.cli.options import (
    Device,
    Include,
    Model,
    Neurological,
    Overwrite,
    Quiet,
    with_reading_options,
)
from diffdiscover3d.cli.report import report
from diffdiscover3d.cli.train import OPTIONS, train
from diffdiscover3d.cli.web_app import start_app
from diffdiscover3d.errors import (
    OUT_OF_MEMORY,
    DiffDiscoverError,
    MemoryLimitError,
    exit_code,
    expected_errors,
    is_out_of_memory,
)
from diffdiscover3d.utils.environment import prepare_environment
from diffdiscover3d.utils.signals import interrupt_on_termination
from diffdiscover3d.utils.terminal import prepare_streams, printable, say

_UsageError = typer.BadParameter.__base__  # of typer's own copy of click, or of click itself


class _Commands(TyperGroup):
    """The commands; their usage errors show what was typed in escaped form."""

    def make_context(self, *arguments, **options):
        with _escaped_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx):
        with _escaped_usage_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _escaped_usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


app = typer.Typer(
    name="diffdiscover3d",
    cls=_Commands,
    help="Find the nested parts of 3D volumes without any labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The pretrained models of the package.", no_args_is_help=True)
app.add_typer(models_app, name="models", rich_help_panel="Models")


class Level(StrEnum):
    """Levels of the hierarchy, as choices of an option."""

    ONE = "1"
    TWO = "2"
    THREE = "3"
    ALL = "all"


_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from diffdiscover3d import __version__

        say(f"diffdiscover3d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


@app.command(rich_help_panel="Use", epilog="Example: diffdiscover3d segment scan.nii.gz --preview")
@with_reading_options()
def segment(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Volumes, folders, globs or lists.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the results (default: beside each input), or a label map's name."
        ),
    ] = None,
    model: Model = "synthetic-regular",
    level: Annotated[
        Level | None, typer.Option(help="Level of a nested model, 1 the coarsest; all writes each (default: 2).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Device = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="Segment at half the resolution: several times faster.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write a picture of three slices.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also write an HTML report with a 3D viewer; it needs no network.")
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Also measure spread, centroid, components and neighbours.")
    ] = False,
    tables: Annotated[
        bool, typer.Option("--tables", help="Also write names and colours for ITK-SNAP and 3D Slicer.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of every part.")
    ] = False,
    order: Annotated[
        str, typer.Option(help="Number parts as the model does (the same in every scan), or by size in each scan.")
    ] = "model",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip scans whose results exist.")] = False,
    *,
    reading: dict,
    include: Include = None,
    neurological: Neurological = False,
    num_parts: Annotated[
        int | None, typer.Option("--num-parts", min=2, help="Take the level with so many parts.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Find parts only where this file on the scan's grid is not 0.")
    ] = None,
    smooth: Annotated[float, typer.Option(min=0, help="Gaussian filter of the probabilities, in voxels.")] = 0.0,
    min_size: Annotated[int, typer.Option("--min-size", min=0, help="Merge pieces of fewer voxels.")] = 0,
    background: Annotated[int | None, typer.Option(min=0, help="The part to write as 0, the background.")] = None,
    share: Annotated[
        str | None, typer.Option(metavar="I/N", help="Work on share I of N, as one of N separate commands.")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Also write manifest.tsv and parts.tsv about all scans.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Load a Hub model from the cache only.")] = False,
    quiet: Quiet = False,
) -> None:
    """Segment volumes into parts: write label maps, .json and .tsv on each input's grid and in its format."""
    from diffdiscover3d.data.formats.registry import split
    from diffdiscover3d.segmentation.outputs import Extras
    from diffdiscover3d.segmentation.preflight import refuse_early, refuse_taken

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
    if not overwrite and not resume and all(split(source)[0].exists() for source in inputs):
        extras = Extras(preview, statistics, tables, probabilities, report)
        refuse_taken(inputs, output, model, level is Level.ALL, extras, include or (), reading["series"], share)
    refuse_early(inputs, device, by_slabs=not fast, **reading)
    from diffdiscover3d.segmentation.driver import segment as run

    errors: list[DiffDiscoverError] = []

    def failed(error: DiffDiscoverError) -> None:
        if _debug:
            raise error
        errors.append(error)
        _print_error(error)

    def done(result) -> None:
        if not quiet:
            for note in result.notes:
                say(f"{result.input}: note: {note}", error=True)
            shares = ", ".join(f"{100 * f:.1f} %" for f in result.fractions)
            shares = f"levels {', '.join(map(str, result.levels))}" if len(result.levels) > 1 else f"parts: {shares}"
            say(f"{result.labels}  {shares}  ({result.seconds:.1f} s)")
            if result.report:
                say(result.report)

    def skipped(path: Path) -> None:
        if not quiet:
            say(f"{path}: finished already, skipped", error=True)

    run(
        inputs,
        output,
        beside_inputs=output is None,
        model=model,
        level=None if level is None else "all" if level is Level.ALL else int(level),
        revision=revision,
        device=device,
        fast=fast,
        order=order,
        preview=preview,
        statistics=statistics,
        tables=tables,
        probabilities=probabilities,
        report=report,
        overwrite=overwrite,
        resume=resume,
        **reading,
        include=include or (),
        neurological=neurological,
        num_parts=num_parts,
        mask=mask,
        smooth=smooth,
        min_size=min_size,
        background=background,
        share=share,
        summary=summary,
        progress=not quiet,
        on_done=done,
        on_error=failed,
        on_skip=skipped,
        on_estimate=None if quiet else lambda line: say(line, error=True),
        on_left_out=None if quiet else lambda line: say(line, error=True),
    )
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _register() -> None:
    """Register the commands, in the order of the help."""
    use, scores_panel, models_panel = "Use", "Data and scores", "Models"
    for command, panel, example in (
        (features, use, "features scan.nii.gz --stage 2 -o features"),
        (generate, use, "generate -n 4 --steps 50 -o samples"),
        (discover, use, "discover scans/ --preset quick -o discovered"),
        (report, use, "report scans/ --parts parts/"),
        (synthesize, scores_panel, "synthesize -n 3 -o cells"),
        (scores.evaluate, scores_panel, "evaluate --output scores.json"),
        (scores.benchmark, scores_panel, "benchmark --table 1 -o tables/one"),
        (evaluate_brats, scores_panel, "evaluate-brats BraTS2021/ -m ours=out/ours -o scores.json"),
        (import_authors_archive, scores_panel, "import-authors-archive synthetic_data/ cells"),
        (push, models_panel, "push out/discovery user/my-parts"),
        (pull, models_panel, "pull user/my-parts my-parts"),
        (convert_authors_checkpoint, models_panel, "convert-authors-checkpoint model-50.pt pipeline"),
        (doctor, "Help", "doctor --json"),
    ):
        app.command(rich_help_panel=panel, epilog=f"Example: diffdiscover3d {example}")(command)
    training = app.command(
        rich_help_panel=use,
        context_settings=OPTIONS,
        epilog="Example: diffdiscover3d train diffusion --dataset scans/ --preset small",
    )
    training(train)
    listing = app.command("list", rich_help_panel=use, epilog="Example: diffdiscover3d list patient/")
    listing(list_contents)
    app.command("app", rich_help_panel=use, epilog="Example: diffdiscover3d app --open")(start_app)
    models_app.command("list", epilog="Example: diffdiscover3d models list")(list_models)


_register()


def _print_error(error: BaseException | str) -> None:
    say(f"error: {error}", error=True)


def main() -> None:
    """Run a command; an error is printed as one line on stderr and sets the exit code, see `errors`."""
    prepare_environment()
    prepare_streams()
    try:
        with interrupt_on_termination():
            app()
    except expected_errors() as error:
        if _debug:
            raise
        _print_error(error if str(error) else OUT_OF_MEMORY)
        sys.exit(exit_code(error))
    except RuntimeError as error:
        if _debug or not is_out_of_memory(error):
            raise
        _print_error(OUT_OF_MEMORY)
        sys.exit(MemoryLimitError.exit_code)
    except KeyboardInterrupt:
        say("interrupted", error=True)
        sys.exit(130)
