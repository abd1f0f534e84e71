"""The commands `evaluate` and `benchmark`: scores of models and of all methods of the tables."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device, Model, Overwrite
from diffdiscover3d.utils.terminal import say, say_lines


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

    result = run(model, dataset, split, level, seed, on_row=lambda row: say(format_rows([row]).splitlines()[-1]))
    say_lines("\n" + format_rows(result["rows"]))
    if output is not None:
        from diffdiscover3d.reporting.plots import save_dice_bars

        write_json(output, result)
        save_dice_bars(output.with_suffix(".png"), result["rows"])


def benchmark(
    dataset: Annotated[
        str | None, typer.Argument(metavar="[FOLDER]", help="Of table 3: the unpacked folder of a BraTS edition.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for models, scores and tables.")] = Path(
        "benchmark"
    ),
    table: Annotated[
        int, typer.Option(min=1, max=3, help="1: methods and ablations; 2: decoder stages; 3: BraTS.")
    ] = 1,
    method: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="regular or irregular; repeatable (default: both).")] = None,
    level: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Only this level; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable (default: 0); one for table 3.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Training recipe: small (CPU) or paper (GPU); default: small, of table 3 paper.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Diffusion model to use (default: train one for each variant).")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test; table 3 also all.")] = "test",
    modality: Annotated[str, typer.Option(help="Of table 3: flair, t1, t1ce or t2.")] = "flair",
    grade: Annotated[
        str, typer.Option(help="Of table 3: HGG, LGG or all, where the edition tells them apart.")
    ] = "HGG",
    crop: Annotated[tuple[int, int, int], typer.Option(help="Of table 3: central box in voxels.")] = (200, 200, 155),
    diffusion_options: Annotated[
        Path | None, typer.Option(help="Of table 3: JSON or YAML file of options for the diffusion training.")
    ] = None,
    discovery_options: Annotated[
        Path | None, typer.Option(help="Of table 3: the same for the discovery trainings.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="Of table 3: starts a training, as 'accelerate launch --num_processes 8 -m'.")
    ] = "",
    med3d: Annotated[
        str | None, typer.Option(help="MedicalNet's ResNet-50 weights: file or Hub id (default: rows left out).")
    ] = None,
    device: Device = "auto",
) -> None:
    """Reproduce a table of the paper: train, score, write JSON, Markdown and PNG. Can be interrupted and resumed."""
    if table == 3:
        _benchmark_brats(
            dataset, output, method, seed, recipe, split, (modality, grade, crop), diffusion_options, discovery_options,
            launcher, device, med3d,
        )  # fmt: skip
        return
    if dataset is not None:
        raise ValueError("a FOLDER goes with --table 3 only.")
    from diffdiscover3d.evaluation.paper_tables import TABLES
    from diffdiscover3d.evaluation.paper_tables import benchmark as run
    from diffdiscover3d.reporting.score_tables import format_table
    from diffdiscover3d.segmentation.driver import choose_device

    def show(row: dict, number: int, count: int) -> None:
        say(
            f"[{number}/{count}] {row['variant']} level {row['level']} {row['title']} seed {row['seed']}: "
            f"{row['dice']:.3f} (one matching {row['dice_one_matching']:.3f})"
        )

    result = run(
        output,
        method or TABLES[table],
        variant or ("regular", "irregular"),
        level or (1, 2, 3),
        seed or (0,),
        on_row=show,
        recipe=recipe or "small",
        teacher=teacher,
        split=split,
        med3d=med3d,
        device=str(choose_device(device)),
    )
    say_lines("\n" + format_table(result["summary"]))
    if result["missing"]:
        say(f"Missing, as they need MedicalNet's weights (--med3d): {', '.join(result['missing'])}.")


def _benchmark_brats(
    dataset,
    output,
    method,
    seed,
    recipe,
    split,
    prepared,
    diffusion_options,
    discovery_options,
    launcher,
    device,
    med3d,
) -> None:
    if dataset is None:
        raise ValueError("table 3 needs the FOLDER of a BraTS edition.")
    if seed and len(seed) > 1:
        raise ValueError("table 3 takes one --seed.")
    from diffdiscover3d.data.datasets.brats import BraTSOptions
    from diffdiscover3d.evaluation.brats import format_brats_rows
    from diffdiscover3d.evaluation.brats_table import fill_table3, format_table3
    from diffdiscover3d.segmentation.driver import choose_device
    from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig
    from diffdiscover3d.training.options import read_options

    result = fill_table3(
        dataset,
        output,
        method,
        on_row=lambda row: say_lines("\n".join(format_brats_rows(row["rows"]).splitlines()[2:])),
        options=BraTSOptions(*prepared),
        split=split,
        recipe=recipe or "paper",
        seed=(seed or [0])[0],
        device=choose_device(device),
        launcher=launcher,
        med3d=med3d,
        diffusion_options=diffusion_options and read_options(DiffusionConfig, diffusion_options),
        discovery_options=discovery_options and read_options(DiscoveryConfig, discovery_options),
    )
    say_lines("\n" + format_table3(result["rows"]))
