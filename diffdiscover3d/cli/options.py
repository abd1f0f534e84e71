"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="Embedded model, folder or Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
VolumeNumber = Annotated[int | None, typer.Option("--volume", help="Volume, channel or time point of several, from 0.")]
NanToZero = Annotated[bool, typer.Option("--nan-to-zero", help="Replace NaN and Inf voxels by 0.")]
IgnoreAffine = Annotated[
    bool, typer.Option("--ignore-affine", help="Use the voxel grid alone if the affine is unusable.")
]
Series = Annotated[str | None, typer.Option("--series", help="DICOM series of a folder with several: number or UID.")]
Resolution = Annotated[int, typer.Option("--resolution", min=0, help="Level of a pyramid, 0 the finest.")]
MissingChunks = Annotated[
    bool, typer.Option("--missing-chunks", help="Take chunks missing from a Zarr array as its fill value.")
]
VoxelSize = Annotated[
    str | None, typer.Option("--voxel-size", help="Of files that give none, along x, y, z: 0.1,0.1,0.3um.")
]
Include = Annotated[
    list[str] | None, typer.Option("--include", help="Take files of this pattern though named like a mask; repeatable.")
]
Neurological = Annotated[
    bool, typer.Option("--neurological", help="Show the patient's left on the left in pictures and reports.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
