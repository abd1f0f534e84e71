"""The command `doctor`."""

from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device
from diffdiscover3d.utils.terminal import say_lines


def doctor(
    device: Device = "auto",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded model, folder or Hub id.")
    ] = "synthetic-regular",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, memory, cache, and what segment would use."""
    import json

    from diffdiscover3d.workflows.doctor import describe, examine

    found = examine(device, model)
    say_lines(json.dumps(found, indent=2) if as_json else describe(found))
