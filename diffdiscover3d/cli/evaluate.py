"""The commands `synthesize`, `evaluate` and `benchmark`: synthetic cells and scores on them."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device, Model, OutputFolder, Overwrite


def synthesize(
    output: OutputFolder = Path("synthetic"),
    variant: Annotated[str, typer.Option(help="regular or irregular.")] = "regular",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Number of volumes (default: the whole split).")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write synthetic cells and their true labels at three levels as NIfTI."""
    from diffdiscover3d.workflows.synthesize import write_synthetic

    for path in write_synthetic(output, variant=variant, split=split, count=count, overwrite=overwrite):
        print(path)


def evaluate(
    model: Model = "synthetic-regular",
    dataset: Annotated[str, typer.Option(help="synthetic-regular or synthetic-irregular.")] = "synthetic-regular",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    level: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Level to score; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the scores as JSON, and a bar chart as PNG.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of k-means.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Score a model and k-means on synthetic cells: Dice at each level."""
    from diffdiscover3d.utils.files import check_targets, write_json

    if output is not None:
        check_targets([output, output.with_suffix(".png")], overwrite)
    from diffdiscover3d.evaluation.synthetic import evaluate as run
    from diffdiscover3d.evaluation.synthetic import format_rows

    result = run(
        model, dataset, split, level, seed, progress_callback=lambda row: print(format_rows([row]).splitlines()[-1])
    )
    print("\n" + format_rows(result["rows"]))
    if output is not None:
        from diffdiscover3d.reporting.plots import save_dice_bars

        write_json(output, result)
        save_dice_bars(output.with_suffix(".png"), result["rows"])


def benchmark(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for models, scores and tables.")] = Path(
        "benchmark"
    ),
    table: Annotated[int, typer.Option(min=1, max=3, help="1: methods; 2: decoder stages; 3: BraTS.")] = 1,
    method: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="regular or irregular; repeatable (default: both).")] = None,
    level: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Only this level; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable (default: 0).")] = None,
    recipe: Annotated[str, typer.Option(help="Training recipe: small (CPU) or paper (GPU).")] = "small",
    teacher: Annotated[
        str | None, typer.Option(help="Diffusion model to use (default: train one for each variant).")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    med3d: Annotated[
        str | None, typer.Option(help="MedicalNet's ResNet-50 weights: file or Hub id (default: rows left out).")
    ] = None,
    brats: Annotated[Path | None, typer.Option(help="Folder of a BraTS edition, for table 3.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or Hub id of a trained network, for table 3; repeatable.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Reproduce a table of the paper: train, score, write JSON, Markdown and PNG. Can be interrupted and resumed."""
    from diffdiscover3d.evaluation.paper_methods import TABLES
    from diffdiscover3d.evaluation.paper_tables import benchmark as run
    from diffdiscover3d.reporting.score_tables import format_table
    from diffdiscover3d.segmentation.driver import choose_device

    shared = {"recipe": recipe, "teacher": teacher, "split": split, "med3d": med3d}
    shared["device"] = str(choose_device(device))
    if table == 3:
        _brats_table(output, brats, method, seed, model, shared)
        return

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
        progress_callback=show,
        **shared,
    )
    print("\n" + format_table(result["summary"]))
    _print_missing(result["missing"])


def _brats_table(
    output: Path,
    brats: Path | None,
    methods: list[str] | None,
    seeds: list[int] | None,
    models: list[str] | None,
    shared,
) -> None:
    from diffdiscover3d.cli.brats import named_models
    from diffdiscover3d.evaluation.brats_table import brats_table, format_brats_table
    from diffdiscover3d.evaluation.paper_methods import TABLES

    if brats is None:
        raise ValueError("table 3 needs --brats FOLDER, the unpacked training set of a BraTS edition.")
    if len(seeds or (0,)) > 1:
        raise ValueError(f"table 3 takes one --seed, got {len(seeds)}; run it once for each, with its own --output.")
    seed = seeds[0] if seeds else 0

    def show(row: dict, number: int, count: int) -> None:
        print(f"[{number}/{count}] {row['title']}: Dice {row['raw']['dice']:.3f}", flush=True)

    result = brats_table(
        output, brats, methods or TABLES[3], named_models(models), seed=seed, progress_callback=show, **shared
    )
    print("\n" + format_brats_table(result["rows"]))
    _print_missing(result["missing"])


def _print_missing(methods: list[str]) -> None:
    if methods:
        print(f"Missing, for want of weights (--med3d, --teacher): {', '.join(methods)}.")
