"""The command `list`."""

from typing import Annotated

import typer

from diffdiscover3d.cli.options import Include
from diffdiscover3d.utils.terminal import say, say_lines


def list_contents(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Folders, globs, lists or volumes.")],
    include: Include = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the volumes that a folder holds, with format, size and voxel size, and what is left out and why."""
    import json

    from diffdiscover3d.data.datasets.listing import describe_left_out, describe_volume, look_into

    found, usable = [], False
    for path in paths:
        contents = look_into(path, include or ())
        volumes = [describe_volume(volume) for volume in contents.volumes]
        usable = usable or any("fault" not in volume for volume in volumes)
        if as_json:
            left_out = [{"path": str(p), "reason": reason} for p, reason in contents.left_out]
            found.append({"source": path, "volumes": volumes, "left_out": left_out, "other_files": contents.others})
            continue
        for volume in volumes:
            say(f"{volume['path']}  {volume['fault'] if 'fault' in volume else _grid(volume)}")
        for line in describe_left_out(contents):
            say(line, error=True)
        if contents.others:
            say(f"{contents.others} other file(s)", error=True)
    if as_json:
        say_lines(json.dumps(found, indent=2))
    if not usable:
        raise typer.Exit(3)


def _grid(volume: dict) -> str:
    shape, size = "×".join(map(str, volume["shape"])), "×".join(f"{s:.3g}" for s in volume["voxel_size"])
    size = "unknown size" if volume["unit"] == "voxels" else f"{size} {volume['unit']}"
    return f"{volume['format']}  {shape} voxels of {size}  {volume['dtype']}"
