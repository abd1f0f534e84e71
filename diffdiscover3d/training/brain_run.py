"""The whole training of `brain-flair` in one process: the nested network, then the diffusion model."""

import dataclasses
import logging
from pathlib import Path

from diffdiscover3d.data.datasets.brain_scans import BrainScans
from diffdiscover3d.training.brain import BrainDiffusion, BrainTraining, SceneBank
from diffdiscover3d.training.brain_config import BrainConfig, diffusion_config
from diffdiscover3d.training.fingerprints import dataset_fingerprint
from diffdiscover3d.training.loop import check_launcher, make_accelerator, train
from diffdiscover3d.training.precision import settle_precision
from diffdiscover3d.training.resume import CONFIG_FILE, check_output

logger = logging.getLogger("diffdiscover3d")


def train_brain(config: BrainConfig) -> Path:
    """Train both models into `diffusion` and `discovery` inside of the output folder.

    Interrupted, the same options with `resume="latest"` go on; a model that is finished is not trained again.

    Returns:
        The output folder, which has the layout of an embedded model.

    Raises:
        InputError: if a scan cannot be used.
        ModelError, OutputError, TrainingInterrupted: as [`train`].
    """
    check_launcher()
    output = Path(config.output_dir)
    place = output / "discovery"
    config = settle_precision(dataclasses.replace(config, output_dir=str(place)), place / CONFIG_FILE)
    scans = BrainScans(config.dataset, config.frame, config.phantoms, **config.reading)
    identity = {"dataset": dataset_fingerprint(scans)}
    if config.resume and (place / "config.json").is_file():
        logger.info("%s is finished", place)
    else:
        check_output(config)
        accelerator = make_accelerator(config)
        train(BrainTraining(config, scans, accelerator), config, scans, accelerator, identity)
    if not config.diffusion_steps:
        return output
    teacher = diffusion_config(config, str(output / "diffusion"))
    if config.resume and (output / "diffusion" / "model_index.json").is_file():
        logger.info("%s is finished", output / "diffusion")
    else:
        check_output(teacher)
        accelerator = make_accelerator(teacher)
        bank = SceneBank(scans, config.real_share, accelerator.device)
        train(BrainDiffusion(teacher, bank), teacher, scans, accelerator, identity)
    return output
