"""The command `train`: the trainings of `diffdiscover3d.train`, which parses their options."""

import typer

OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Train a diffusion model, a discovery network on its features, or both for brain scans, on one process.

    Arguments: diffusion, discovery or brain, and the options of this training; `train PHASE --help` lists them. For
    several GPUs: `accelerate launch --num_processes N -m diffdiscover3d.train PHASE`, with the same options.
    """
    from diffdiscover3d.train import main
    from diffdiscover3d.utils.signals import end_children

    debug = ["--debug"] if context.find_root().params.get("debug") else []
    arguments = [*context.args[:1], *debug, *context.args[1:]] if context.args[:1] != ["--help"] else context.args
    try:
        code = main(arguments, program="diffdiscover3d train")
    finally:
        end_children()
    raise typer.Exit(code)
