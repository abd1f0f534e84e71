"""The command line: parse, call one function, print. Heavy imports wait inside the commands."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d import cli_data, cli_hub
from diffdiscover3d.commands.discover import discover
from diffdiscover3d.commands.doctor import doctor
from diffdiscover3d.commands.report import report
from diffdiscover3d.errors import (
    OUT_OF_MEMORY,
    DiffDiscoverError,
    MemoryLimitError,
    OutputError,
    exit_code,
    is_out_of_memory,
    reportable_errors,
)
from diffdiscover3d.interruption import interrupt_on_sigterm

app = typer.Typer(
    name="diffdiscover3d",
    help="Find the nested parts of 3D volumes without any labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The pretrained models that come with the package.", no_args_is_help=True)
app.add_typer(models_app, name="models", rich_help_panel="Models")
for _panel, _command, _example in (
    ("Models", cli_hub.push, "push out/discovery user/my-parts"),
    ("Models", cli_hub.pull, "pull user/my-parts my-parts"),
    ("Data and scores", cli_data.evaluate_brats, "evaluate-brats BraTS2021/ -m ours=out/ours -o scores.json"),
    ("Data and scores", cli_data.import_authors_archive, "import-authors-archive synthetic_data/ cells"),
):
    app.command(rich_help_panel=_panel, epilog=f"Example: diffdiscover3d {_example}")(_command)


class Level(StrEnum):
    """Levels of the hierarchy, as the command line offers them."""

    ONE = "1"
    TWO = "2"
    THREE = "3"
    ALL = "all"


Model = Annotated[str, typer.Option("--model", "-m", help="Embedded model, folder or Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
VolumeNumber = Annotated[int | None, typer.Option("--volume", help="Which volume of a 4-D file, from 0.")]
NanToZero = Annotated[bool, typer.Option("--nan-to-zero", help="Put 0 for NaN and Inf voxels.")]
IgnoreAffine = Annotated[bool, typer.Option("--ignore-affine", help="Go on where the affine is unusable.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]

_debug = False
for _command, _panel, _example in (
    (discover, "Use", "discover scans/ --preset quick -o discovered"),
    (report, "Use", "report scans/ --parts parts/"),
    (doctor, "Help", "doctor --json"),
):
    app.command(rich_help_panel=_panel, epilog=f"Example: diffdiscover3d {_example}")(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from diffdiscover3d import __version__

        print(f"diffdiscover3d {__version__}")
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
def segment(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="NIfTI files, folders, globs or lists.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results (default: beside each input).")
    ] = None,
    model: Model = "synthetic-regular",
    level: Annotated[
        Level | None, typer.Option(help="Coarse to fine, of a model with levels; all writes each (default: 2).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Device = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="At half the resolution: several times faster.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write a picture of three slices.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also write a page with a 3D viewer; opens without a network.")
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
    resume: Annotated[bool, typer.Option("--resume", help="Skip scans whose results are there.")] = False,
    volume: VolumeNumber = None,
    nan_to_zero: NanToZero = False,
    ignore_affine: IgnoreAffine = False,
    offline: Annotated[bool, typer.Option("--offline", help="Take a Hub model from the cache only.")] = False,
    quiet: Quiet = False,
) -> None:
    """Divide volumes into parts: writes STEM_dseg.nii.gz, .json and .tsv, on each input's own grid."""
    from diffdiscover3d.data.preflight import refuse_early

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported, which is still to come
    refuse_early(inputs, device, by_slabs=not fast, volume=volume, nan_to_zero=nan_to_zero, ignore_affine=ignore_affine)
    from diffdiscover3d.segmentation import segment as run

    errors: list[DiffDiscoverError] = []

    def failed(error: DiffDiscoverError) -> None:
        if _debug:
            raise error
        errors.append(error)
        _print_error(error)

    def done(result) -> None:
        if not quiet:
            for note in result.notes:
                print(f"{result.input}: note: {note}", file=sys.stderr)
            shares = ", ".join(f"{100 * f:.1f} %" for f in result.fractions)
            shares = f"levels {', '.join(map(str, result.levels))}" if len(result.levels) > 1 else f"parts: {shares}"
            print(f"{result.labels}  {shares}  ({result.seconds:.1f} s)")
            if result.report:
                print(result.report)

    def skipped(path: Path) -> None:
        if not quiet:
            print(f"{path}: finished already, skipped", file=sys.stderr)

    run(
        inputs,
        output,
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
        volume=volume,
        nan_to_zero=nan_to_zero,
        ignore_affine=ignore_affine,
        progress=not quiet,
        on_done=done,
        on_error=failed,
        on_skip=skipped,
        on_estimate=None if quiet else lambda line: print(line, file=sys.stderr),
    )
    if errors:
        raise typer.Exit(errors[0].exit_code)


@app.command(rich_help_panel="Use", epilog="Example: diffdiscover3d features scan.nii.gz --stage 2 -o features")
def features(
    input: Annotated[str, typer.Argument(help="A NIfTI file.")],
    output: OutputFolder = Path("."),
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded model, folder or Hub id.")
    ] = "synthetic-regular",
    stage: Annotated[
        list[int] | None, typer.Option(min=1, help="Decoder stage, 1 is the coarsest; repeatable.")
    ] = None,
    timestep: Annotated[int, typer.Option(help="Noise step t.")] = 25,
    num_noise: Annotated[int, typer.Option(help="Noise draws to average over.")] = 1,
    upsample: Annotated[bool, typer.Option("--upsample", help="Bring the features to the scan's grid.")] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Also write a picture: three principal components as colours.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    volume: VolumeNumber = None,
    nan_to_zero: NanToZero = False,
    ignore_affine: IgnoreAffine = False,
) -> None:
    """Write the diffusion features of a scan, one 4-D NIfTI per stage, lying on the scan."""
    from diffdiscover3d.data.preflight import refuse_early

    refuse_early([input], device, volume=volume, nan_to_zero=nan_to_zero, ignore_affine=ignore_affine)
    from diffdiscover3d.extraction import extract_features

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
        volume=volume,
        nan_to_zero=nan_to_zero,
        ignore_affine=ignore_affine,
    )
    for path in paths:
        print(path)


@app.command(rich_help_panel="Use", epilog="Example: diffdiscover3d generate -n 4 --steps 50 -o samples")
def generate(
    output: OutputFolder = Path("samples"),
    model: Model = "synthetic-regular",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many volumes.")] = 1,
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
    from diffdiscover3d.extraction import generate_volumes

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
        print(path)


@app.command(rich_help_panel="Data and scores", epilog="Example: diffdiscover3d synthesize -n 3 -o cells")
def synthesize(
    output: OutputFolder = Path("synthetic"),
    variant: Annotated[str, typer.Option(help="regular or irregular.")] = "regular",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="How many (default: the whole split).")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write synthetic cells and their three levels of true labels as NIfTI."""
    from diffdiscover3d.extraction import write_synthetic

    for path in write_synthetic(output, variant=variant, split=split, count=count, overwrite=overwrite):
        print(path)


@app.command(rich_help_panel="Data and scores", epilog="Example: diffdiscover3d evaluate --output scores.json")
def evaluate(
    model: Model = "synthetic-regular",
    dataset: Annotated[str, typer.Option(help="synthetic-regular or synthetic-irregular.")] = "synthetic-regular",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    level: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Level to score; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON, and bars as PNG beside it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of k-means.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Dice of a model on synthetic cells at each level, beside k-means run in the same command."""
    from diffdiscover3d.files import check_targets, write_json

    if output is not None:
        check_targets([output, output.with_suffix(".png")], overwrite)
    from diffdiscover3d.evaluation import evaluate as run
    from diffdiscover3d.evaluation import format_rows

    result = run(model, dataset, split, level, seed, report=lambda row: print(format_rows([row]).splitlines()[-1]))
    print("\n" + format_rows(result["rows"]))
    if output is not None:
        from diffdiscover3d.reporting.plots import save_dice_bars

        write_json(output, result)
        save_dice_bars(output.with_suffix(".png"), result["rows"])


@app.command(rich_help_panel="Data and scores", epilog="Example: diffdiscover3d benchmark --table 1 -o tables/one")
def benchmark(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for models, figures and tables.")] = Path(
        "benchmark"
    ),
    table: Annotated[int, typer.Option(min=1, max=2, help="1: methods and ablations; 2: stages.")] = 1,
    method: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="regular or irregular; repeatable (default: both).")] = None,
    level: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Only this level; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable (default: 0).")] = None,
    recipe: Annotated[str, typer.Option(help="How networks are trained: small (CPU) or paper (GPU).")] = "small",
    teacher: Annotated[
        str | None, typer.Option(help="Diffusion model to use (default: train one for each variant).")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Fill a table of the paper from nothing: train, score, write JSON, Markdown and PNG. Interrupted, it goes on."""
    from diffdiscover3d.benchmark import TABLES
    from diffdiscover3d.benchmark import benchmark as run
    from diffdiscover3d.reporting.score_tables import format_table

    def show(row: dict, number: int, count: int) -> None:
        print(
            f"[{number}/{count}] {row['variant']} level {row['level']} {row['title']} seed {row['seed']}: "
            f"{row['dice']:.3f} (one matching {row['dice_one_matching']:.3f})",
            flush=True,
        )

    result = run(
        output,
        method or TABLES[table],
        variant or ("regular", "irregular"),
        level or (1, 2, 3),
        seed or (0,),
        report=show,
        recipe=recipe,
        teacher=teacher,
        split=split,
    )
    print("\n" + format_table(result["summary"]))


@models_app.command("list", epilog="Example: diffdiscover3d models list")
def list_models() -> None:
    """List the embedded models, their levels and sizes."""
    from diffdiscover3d.hub import embedded_models

    for name, model in embedded_models().items():
        size = sum(p.stat().st_size for p in model.folder.rglob("*.safetensors")) / 2**20
        levels = ", ".join(map(str, model.levels))
        print(f"{name}  diffusion model and levels {levels}  {size:.1f} MiB  {model.folder}")


@app.command("convert-authors-checkpoint", rich_help_panel="Models")
def convert_authors_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' .pt file.")],
    output: Annotated[Path, typer.Argument(help="Folder for the pipeline.")],
    num_train_timesteps: Annotated[int, typer.Option(help="Steps T of its noise schedule.")] = 250,
    overwrite: Overwrite = False,
) -> None:
    """Turn a checkpoint released by the paper's authors into a pipeline folder. Nothing in it is executed."""
    from diffdiscover3d.files import check_folder, staged_folder

    check_folder(output)
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output}: exists already; --overwrite replaces it.")
    from diffdiscover3d.models.authors_checkpoint import load_authors_checkpoint
    from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler

    unet = load_authors_checkpoint(checkpoint)
    with staged_folder(output) as folder:
        DiffusionFeaturePipeline(unet, make_scheduler(num_train_timesteps)).save_pretrained(folder)
    print(output)


def _print_error(error: BaseException | str) -> None:
    print(f"error: {error}", file=sys.stderr)


def main() -> None:
    """Run a command; errors end in one line on stderr and their exit code, see `errors`."""
    interrupt_on_sigterm()
    try:
        app()
    except reportable_errors() as error:
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
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
