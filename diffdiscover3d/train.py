"""Training from the command line: `diffdiscover3d train diffusion|discovery|brain [options]`.

With several processes: `accelerate launch --num_processes N -m diffdiscover3d.train`, with the same arguments.
"""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from diffdiscover3d.errors import MemoryLimitError, NothingToDivideError, exit_code, expected_errors, is_out_of_memory
from diffdiscover3d.training.brain_config import BrainConfig
from diffdiscover3d.training.config import (
    DiffusionConfig,
    DiscoveryConfig,
    TrainingConfig,
    make_config,
)
from diffdiscover3d.training.options import add_options, check_unknown, with_dashes
from diffdiscover3d.utils.environment import prepare_environment
from diffdiscover3d.utils.files import check_folder
from diffdiscover3d.utils.locks import locked_folder
from diffdiscover3d.utils.processes import exit_process, forget_other_launches
from diffdiscover3d.utils.signals import end_children, interrupt_on_termination
from diffdiscover3d.utils.terminal import prepare_streams, say

_PHASES = {"diffusion": DiffusionConfig, "discovery": DiscoveryConfig, "brain": BrainConfig}


def make_parser(program: str = "diffdiscover3d.train") -> argparse.ArgumentParser:
    """Build the argument parser: one subcommand per phase, one option per config field."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=raw)
    phases = parser.add_subparsers(dest="phase", required=True)
    for name, kind in _PHASES.items():
        several = f"With several processes: accelerate launch --num_processes N -m diffdiscover3d.train {name} ..."
        phase = phases.add_parser(name, help=kind.__doc__.splitlines()[0], description=kind.__doc__, epilog=several)
        phase.add_argument("--config", help="JSON or YAML file of options; command-line options take precedence")
        phase.add_argument("--quiet", action="store_true", help="log only warnings")
        phase.add_argument("--debug", action="store_true", help="show the traceback of an error")
        # set by `discover`, so that messages do not name options that it does not have
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        phase.add_argument("--part-of-discover", action="store_true", **hidden)
        add_options(phase, kind)
    return parser


def run(config: TrainingConfig) -> str:
    """Run the training described by a config and return the output folder."""
    check_folder(Path(config.output_dir))
    # heavy imports follow the validation of the options
    if isinstance(config, BrainConfig):
        from diffdiscover3d.training.brain_run import train_brain

        return str(train_brain(config, _prepare_push))
    from diffdiscover3d.training.launch import check_launcher, make_accelerator
    from diffdiscover3d.training.precision import settle_precision
    from diffdiscover3d.training.resume import CONFIG_FILE, check_output

    check_launcher()
    config = settle_precision(config, Path(config.output_dir) / CONFIG_FILE)
    check_output(config)
    accelerator = make_accelerator(config)
    logging.getLogger("diffdiscover3d").disabled = not accelerator.is_main_process
    # before the data are read: a second training into the same folder is refused at once
    with locked_folder(config.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        return _run(config, accelerator)


def _run(config: TrainingConfig, accelerator) -> str:
    """Read the data, train and push, see [`run`]."""
    from diffdiscover3d.data.loading import common_grid, has_splits, load_volumes
    from diffdiscover3d.hub.registry import load_discovery, load_teacher
    from diffdiscover3d.training.data_check import read_all
    from diffdiscover3d.training.fingerprints import dataset_fingerprint, weights_fingerprint
    from diffdiscover3d.training.loop import train
    from diffdiscover3d.training.schedules import settle_epochs

    push = _prepare_push(config, accelerator)
    brats = config.brats  # fail fast on invalid options
    names = (getattr(config, name, None) for name in ("init_from", "parent"))
    start, parent = (load_discovery(name) if name else None for name in names)
    working = _working_grid(config, start or parent)
    volumes = load_volumes(config.dataset, "train", brats, working, **config.reading)
    config = settle_epochs(config, len(volumes))
    read_all(volumes, accelerator)  # fail fast on unreadable files
    config = _settle_mixed_shapes(config, volumes, common_grid(volumes), accelerator)
    identity = {"dataset": dataset_fingerprint(volumes)}
    if isinstance(config, DiffusionConfig):
        from diffdiscover3d.training.diffusion import DiffusionTraining

        task = DiffusionTraining(config, common_grid(volumes))
    else:
        from diffdiscover3d.training.discovery import DiscoveryTraining

        if not config.teacher:
            raise ValueError(
                "`teacher` is missing: give --teacher with a folder, a Hub id or an embedded model's name."
            )
        selection = load_volumes(config.dataset, "validation", brats) if has_splits(config.dataset) else volumes
        _check_start(config, start)
        if start is not None:
            identity["init_from"] = weights_fingerprint(start)
        teacher = load_teacher(config.teacher)
        identity["teacher"] = weights_fingerprint(teacher.unet)
        if parent is not None:
            identity["parent"] = weights_fingerprint(parent)
        task = DiscoveryTraining(config, teacher, volumes, selection, accelerator, start, parent)
        if task.model.config.children:
            identity["children"] = list(task.model.config.children)
        volumes = task.volumes
    with push or contextlib.nullcontext():
        folder = train(
            task, config, volumes, accelerator, identity, push.at_checkpoint if push and push.every_save else None
        )
        if push:
            push.finish(folder)
        return str(folder)


def _prepare_push(config: TrainingConfig, accelerator):
    """The [`TrainingPush`] of the main process, or `None`."""
    if not (config.push_to_hub and accelerator.is_main_process):
        return None
    from diffdiscover3d.hub.training_push import TrainingPush

    return TrainingPush(config)


def _working_grid(config: TrainingConfig, network):
    """The target spacing: that of the options, or of the network to begin with or whose parts are divided."""
    from diffdiscover3d.data.working_grid import WorkingGrid

    own = None if config.spacing is None else WorkingGrid(spacing=config.spacing, unit=config.spacing_unit)
    if network is None or network.config.spacing is None:
        return own
    theirs = WorkingGrid(spacing=tuple(network.config.spacing), unit=network.config.spacing_unit)
    if own not in (None, theirs):
        raise ValueError(
            f"`spacing` must be that of --init-from or --parent, {theirs.spacing} {theirs.unit}, got {config.spacing} "
            f"{config.spacing_unit}; leave it out."
        )
    return theirs


def _settle_mixed_shapes(config: TrainingConfig, volumes, shared, accelerator) -> TrainingConfig:
    """The config, by which volumes that differ in shape at their target spacing pass through the network one by one."""
    if not getattr(volumes, "working_grid", None):
        return config
    if config.volume_size:
        raise ValueError(f"`volume_size` must be left out with --spacing, got {config.volume_size}.")
    if isinstance(config, DiffusionConfig) or shared is not None:
        return config
    if config.norm == "batch" and config.batch_size > 1:
        raise ValueError(
            "`norm` is batch and the volumes differ in shape at this --spacing, so that they cannot form a batch; use "
            "--norm instance."
        )
    steps = max(1, config.batch_size // accelerator.num_processes)
    accelerator.gradient_accumulation_steps = steps
    return replace(config, gradient_accumulation_steps=steps)


def _check_start(config: DiscoveryConfig, start) -> None:
    """Check that norm and dropout match the initial network, whose architecture takes precedence over the options."""
    for name in ("norm", "dropout"):
        if start is not None and start.config[name] != getattr(config, name):
            raise ValueError(
                f"`{name}` must be that of --init-from, {start.config[name]!r}, got {getattr(config, name)!r}; "
                f"give --{name} {start.config[name]}."
            )


def _describe(error: BaseException) -> str:
    """The message of an error; of one raised in a data-loading worker, which includes its traceback, the last line."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1]
    return text or type(error).__name__


def main(arguments: list[str] | None = None, program: str = "diffdiscover3d.train") -> int:
    """Parse the arguments, train and print the output folder; return the exit code."""
    parsed, unknown = make_parser(program).parse_known_args(
        with_dashes(sys.argv[1:] if arguments is None else arguments)
    )
    options = vars(parsed)
    phase, file, debug = options.pop("phase"), options.pop("config", None), options.pop("debug")
    quiet, part = options.pop("quiet"), options.pop("part_of_discover", False)
    prepare_environment()
    prepare_streams()
    logging.getLogger("diffdiscover3d").setLevel(logging.WARNING if quiet else logging.INFO)
    if line := forget_other_launches():
        say(line, error=True)
    try:
        check_unknown(unknown, _PHASES[phase], _PHASES)
        config = make_config(_PHASES[phase], file=file, **options)
        folder = run(config)
        if os.environ.get("RANK", "0") == "0":
            say(folder)
    except expected_errors() as error:
        if debug:
            raise
        kind = "note" if isinstance(error, NothingToDivideError) else "error"
        say(f"{kind}: {_describe(error)}", error=True)
        return exit_code(error)
    except RuntimeError as error:
        if debug or not is_out_of_memory(error):
            raise
        remedy = "" if part else "lower --batch-size or --volume-size, or "
        say(f"error: out of memory; {remedy}use a larger machine.", error=True)
        return MemoryLimitError.exit_code
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            message = str(stop) or "interrupted; checkpoints are complete, continue with --resume latest."
            say(message.split(";")[0] if part else message, error=True)
        return 130
    return 0


if __name__ == "__main__":
    try:
        with interrupt_on_termination():
            code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    finally:
        end_children()
    exit_process(code)
