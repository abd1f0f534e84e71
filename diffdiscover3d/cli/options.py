"""Options shared by several commands."""

import functools
import inspect
from collections.abc import Callable
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
Resolution = Annotated[int, typer.Option("--resolution", min=0, help="Resolution of a pyramid, 0 the finest.")]
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

# how files are read: in the order of the help, with their defaults
_READING = {
    "volume": (VolumeNumber, None),
    "nan_to_zero": (NanToZero, False),
    "ignore_affine": (IgnoreAffine, False),
    "series": (Series, None),
    "resolution": (Resolution, 0),
    "missing_chunks": (MissingChunks, False),
    "voxel_size": (VoxelSize, None),
}


def with_reading_options(*left_out: str) -> Callable[[Callable], Callable]:
    """Give a command the options about how its files are read.

    They take the place of its keyword-only parameter `reading`, which receives a dict of their values.

    Args:
        *left_out: those that the command does not take, or declares itself.
    """
    options = {name: option for name, option in _READING.items() if name not in left_out}

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def with_reading(**given):
            return command(reading={name: given.pop(name) for name in options}, **given)

        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name != "reading":
                parameters.append(parameter)
                continue
            for name, (annotation, default) in options.items():
                parameters.append(inspect.Parameter(name, parameter.kind, default=default, annotation=annotation))
        with_reading.__signature__ = inspect.Signature(parameters)
        with_reading.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_reading

    return decorate
