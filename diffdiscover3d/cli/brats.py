"""The command `evaluate-brats`: scores on BraTS."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device, Overwrite
from diffdiscover3d.utils.terminal import say, say_lines


def evaluate_brats(
    dataset: Annotated[str, typer.Argument(help="The unpacked folder of a BraTS edition, training set.")],
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="NAME=FOLDER or NAME=HUB_ID; repeatable, one row each.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    modality: Annotated[str, typer.Option(help="flair, t1, t1ce or t2.")] = "flair",
    grade: Annotated[str, typer.Option(help="HGG, LGG or all, in editions that list grades.")] = "HGG",
    crop: Annotated[tuple[int, int, int], typer.Option(help="Central box in voxels.")] = (200, 200, 155),
    clip_percentiles: Annotated[
        tuple[float, float] | None, typer.Option(help="Clip intensities to these percentiles of the tissue.")
    ] = None,
    kmeans: Annotated[bool, typer.Option(help="Also score k-means on the intensities.")] = True,
    teacher: Annotated[str | None, typer.Option(help="Diffusion model: also score k-means on its features.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the scores as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of k-means.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Dice and HD95 of the whole tumour, with and without post-processing, one table for all models."""
    from diffdiscover3d.utils.files import check_targets, write_json

    if output is not None:
        check_targets([output], overwrite)
    from diffdiscover3d.data.datasets.brats import BraTSOptions
    from diffdiscover3d.evaluation.brats import evaluate_brats as run
    from diffdiscover3d.evaluation.brats import format_brats_rows
    from diffdiscover3d.segmentation.driver import choose_device

    models = named_models(model)
    options = BraTSOptions(modality, grade, crop, clip_percentiles)
    result = run(
        dataset,
        models,
        split,
        options,
        kmeans,
        teacher,
        seed,
        choose_device(device),
        on_row=lambda row: say(format_brats_rows([row]).splitlines()[-1]),
    )
    say_lines("\n" + format_brats_rows(result["rows"]))
    if output is not None:
        write_json(output, result)


def named_models(values: list[str] | None) -> dict[str, str]:
    """NAME=FOLDER options as a mapping.

    Raises:
        ValueError: if two have one name.
    """
    models = {}
    for value in values or []:
        name, _, source = value.rpartition("=")
        models[name or "diffdiscover3d"] = source
    if len(models) < len(values or []):
        raise ValueError("each --model needs a name of its own: --model NAME=FOLDER.")
    return models
