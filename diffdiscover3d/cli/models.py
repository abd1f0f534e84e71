"""The commands `models list` and `convert-authors-checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import Overwrite
from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils.terminal import say


def list_models() -> None:
    """List the embedded models, their levels and sizes."""
    from diffdiscover3d.hub.registry import embedded_models

    for name, model in embedded_models().items():
        size = sum(p.stat().st_size for p in model.folder.rglob("*.safetensors")) / 2**20
        levels = ", ".join(map(str, model.levels))
        say(f"{name}  diffusion model and levels {levels}  {size:.1f} MiB  {model.folder}")


def convert_authors_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' .pt file.")],
    output: Annotated[Path, typer.Argument(help="Folder for the pipeline.")],
    num_train_timesteps: Annotated[int, typer.Option(help="Steps T of its noise schedule.")] = 250,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint released by the paper's authors to a pipeline folder. Nothing in it is executed."""
    from diffdiscover3d.utils.files import check_folder
    from diffdiscover3d.utils.staging import staged_folder

    check_folder(output)
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output}: exists already; --overwrite replaces it.")
    from diffdiscover3d.models.authors_checkpoint import load_authors_checkpoint
    from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler

    unet = load_authors_checkpoint(checkpoint)
    with staged_folder(output) as folder:
        DiffusionFeaturePipeline(unet, make_scheduler(num_train_timesteps)).save_pretrained(folder)
    say(output)
