"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="Embedded model, folder or Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
VolumeNumber = Annotated[int | None, typer.Option("--volume", help="Volume of a 4-D file, from 0.")]
NanToZero = Annotated[bool, typer.Option("--nan-to-zero", help="Replace NaN and Inf voxels by 0.")]
IgnoreAffine = Annotated[
    bool, typer.Option("--ignore-affine", help="Use the voxel grid alone if the affine is unusable.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
