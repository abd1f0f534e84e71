"""The commands `synthesize` and `import-authors-archive`: volumes with known parts as NIfTI files."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.cli.options import OutputFolder, Overwrite
from diffdiscover3d.utils.terminal import say


def synthesize(
    output: OutputFolder = Path("synthetic"),
    variant: Annotated[str, typer.Option(help="regular, irregular or brain-phantom.")] = "regular",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Number of volumes (default: the whole split).")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write synthetic cells or brain phantoms and their true labels as NIfTI."""
    from diffdiscover3d.workflows.synthesize import write_synthetic

    for path in write_synthetic(output, variant=variant, split=split, count=count, overwrite=overwrite):
        say(path)


def import_authors_archive(
    archive: Annotated[Path, typer.Argument(help="The folder with train/ and test/ of im_*.p and truth_*.p.")],
    output: Annotated[Path, typer.Argument(help="Folder for NIfTI volumes and their labels.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn the authors' pickled synthetic cells into NIfTI files. Nothing in the pickles is executed."""
    from diffdiscover3d.data.datasets.authors_archive import import_archive

    for path in import_archive(archive, output, overwrite=overwrite):
        say(path)
