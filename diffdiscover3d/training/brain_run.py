"""The whole training of `brain-flair` in one process: the nested network, then the diffusion model."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from diffdiscover3d.data.datasets.brain_scans import BrainScans
from diffdiscover3d.training.brain import BrainDiffusion, BrainTraining, SceneBank
from diffdiscover3d.training.brain_config import BrainConfig, diffusion_config
from diffdiscover3d.training.config import TrainingConfig
from diffdiscover3d.training.fingerprints import dataset_fingerprint
from diffdiscover3d.training.launch import check_launcher, make_accelerator
from diffdiscover3d.training.loop import train
from diffdiscover3d.training.precision import settle_precision
from diffdiscover3d.training.resume import CONFIG_FILE, check_output
from diffdiscover3d.training.schedules import settle_epochs
from diffdiscover3d.utils.locks import locked_folder

logger = logging.getLogger("diffdiscover3d")


def train_brain(config: BrainConfig, prepare_push: Callable | None = None) -> Path:
    """Train both models into `diffusion` and `discovery` inside of the output folder.

    Interrupted, the same options with `resume="latest"` go on; a model that is finished is not trained again.

    Args:
        config: training options. With `push_to_hub`, the network is pushed to `hub_model_id` and the diffusion model to
            `<hub_model_id>-diffusion`.
        prepare_push: returns the [`TrainingPush`] of a config and an accelerator, or `None`.

    Returns:
        The output folder, which has the layout of an embedded model.

    Raises:
        InputError: if a scan cannot be used.
        ModelError, OutputError, TrainingInterrupted: as [`train`].
        NetworkError: if a push fails.
    """
    check_launcher()
    output = Path(config.output_dir)
    place = output / "discovery"
    config = settle_precision(dataclasses.replace(config, output_dir=str(place)), place / CONFIG_FILE)
    if config.push_to_hub and config.hub_model_id is None:
        config = dataclasses.replace(config, hub_model_id=output.resolve().name)
    scans = BrainScans(config.dataset, config.frame, config.phantoms, **config.reading)
    config = settle_epochs(config, len(scans))

    def network(accelerator: Accelerator) -> BrainTraining:
        return BrainTraining(config, scans, accelerator)

    _train(config, "config.json", network, scans, prepare_push)
    if not config.diffusion_steps:
        return output
    teacher = diffusion_config(config, str(output / "diffusion"))

    def diffusion(accelerator: Accelerator) -> BrainDiffusion:
        return BrainDiffusion(teacher, SceneBank(scans, config.real_share, accelerator.device))

    _train(teacher, "model_index.json", diffusion, scans, prepare_push)
    return output


def _train(config: TrainingConfig, result: str, make_task: Callable, scans: BrainScans, prepare_push) -> None:
    """Train and push one of both models, unless it is finished."""
    folder = Path(config.output_dir)
    finished = config.resume and (folder / result).is_file()
    if not finished:
        check_output(config)
    accelerator = make_accelerator(config)
    push = prepare_push(config, accelerator) if prepare_push else None
    with (
        locked_folder(folder) if accelerator.is_main_process else contextlib.nullcontext(),
        push or contextlib.nullcontext(),
    ):
        if finished:
            logger.info("%s is finished", folder)
        else:
            identity = {"dataset": dataset_fingerprint(scans)}
            on_checkpoint = push.at_checkpoint if push and push.every_save else None
            train(make_task(accelerator), config, scans, accelerator, identity, on_checkpoint)
        if push:
            push.finish(folder)
