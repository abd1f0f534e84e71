"""Training from the command line: `accelerate launch -m diffdiscover3d.train diffusion|discovery [options]`."""

import argparse
import logging
import os
import sys

from diffdiscover3d.errors import exit_code, reportable_errors
from diffdiscover3d.training.config import (
    DiffusionConfig,
    DiscoveryConfig,
    TrainingConfig,
    add_options,
    make_config,
)

_STAGES = {"diffusion": DiffusionConfig, "discovery": DiscoveryConfig}


def make_parser() -> argparse.ArgumentParser:
    """The parser; every field of the two configs is an option."""
    parser = argparse.ArgumentParser(prog="diffdiscover3d.train", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, kind in _STAGES.items():
        stage = stages.add_parser(name, help=kind.__doc__.splitlines()[0], description=kind.__doc__)
        stage.add_argument("--config", help="JSON or YAML file of options; options given here go before it")
        stage.add_argument("--quiet", action="store_true", help="log nothing but warnings")
        stage.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_options(stage, kind)
    return parser


def run(config: TrainingConfig) -> str:
    """Train what the config describes; return the output folder."""
    # the heavy imports wait until the options are known to be right
    from diffdiscover3d.data.loading import SYNTHETIC_NAMES, common_grid, load_volumes
    from diffdiscover3d.hub import load_discovery, load_teacher
    from diffdiscover3d.training.runtime import make_accelerator, train

    accelerator = make_accelerator(config)
    logging.getLogger("diffdiscover3d").disabled = not accelerator.is_main_process
    volumes = load_volumes(config.dataset, "train")
    if isinstance(config, DiffusionConfig):
        from diffdiscover3d.training.diffusion import DiffusionTraining

        task = DiffusionTraining(config, common_grid(volumes))
    else:
        from diffdiscover3d.training.discovery import DiscoveryTraining

        if not config.teacher:
            raise ValueError(
                "`teacher` is missing: give --teacher with a folder, a Hub id or an embedded model's name."
            )
        named = config.dataset in SYNTHETIC_NAMES
        selection = load_volumes(config.dataset, "validation") if named else volumes
        start = load_discovery(config.init_from) if config.init_from else None
        parent = load_discovery(config.parent) if config.parent else None
        task = DiscoveryTraining(config, load_teacher(config.teacher), volumes, selection, accelerator, start, parent)
    return str(train(task, config, volumes, accelerator))


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, print where the model is; errors end in one line and their exit code."""
    options = vars(make_parser().parse_args(arguments))
    stage, file, debug = options.pop("stage"), options.pop("config", None), options.pop("debug")
    quiet = options.pop("quiet")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("diffdiscover3d").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        config = make_config(_STAGES[stage], file=file, **options)
        folder = run(config)
        if os.environ.get("RANK", "0") == "0":
            print(folder)
    except reportable_errors() as error:
        if debug:
            raise
        # an error in a process that loads volumes arrives with that process's traceback: its last line says it
        print(f"error: {str(error).strip().splitlines()[-1] if str(error) else type(error).__name__}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; the newest checkpoint is whole, --resume latest goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
