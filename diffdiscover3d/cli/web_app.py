"""The command `app`."""

from typing import Annotated

import typer

from diffdiscover3d.cli.options import Device


def start_app(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Model to choose from: embedded, folder or Hub id; repeatable (default: the embedded).",
        ),
    ] = None,
    device: Device = "auto",
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: 127.0.0.1, this machine only).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port (default: the first free from 7860).")
    ] = None,
    max_size: Annotated[int, typer.Option("--max-size", min=1, help="Limit of an upload in MB.")] = 512,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the default browser.")] = False,
) -> None:
    """Segment volumes in a browser: upload, choose a model, look at the parts, download label maps and the report."""
    from diffdiscover3d.app import serve

    serve(models=models or (), device=device, host=host, port=port, max_size_mb=max_size, open_browser=open_browser)
