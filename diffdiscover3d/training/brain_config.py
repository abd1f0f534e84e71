"""Options of the training of `brain-flair`."""

import dataclasses
import typing
from dataclasses import dataclass

from diffdiscover3d.training.config import PRESETS, DiffusionConfig, TrainingConfig
from diffdiscover3d.training.options import option

SIZES = ("small", "tiny")


@dataclass(frozen=True)
class BrainConfig(TrainingConfig):
    """A diffusion model and a nested network (background | brain, brain | lesion) from brain-extracted FLAIR scans."""

    dataset: str = option("", "a folder, glob or text list of brain-extracted FLAIR scans (NIfTI)")
    max_steps: int = option(1_700, "optimiser steps of the discovery")
    diffusion_steps: int = option(250, "optimiser steps of the diffusion model, which is trained last; 0 skips it")
    batch_size: int = option(4, "scenes per optimiser step")
    learning_rate: float = option(2e-3, "Adam's peak learning rate")
    lr_schedule: str = option("one_cycle", "how the rate changes over the steps", ("constant", "one_cycle"))
    flips: bool = option(False, "left to the scenes, which are mirrored from left to right only")
    frame: tuple[int, ...] = option((96, 112, 96), "grid to which every brain is resampled, three integers")
    phantoms: int = option(2, "brain phantoms added to the scans")
    real_share: float = option(0.25, "share of scenes that keep the scan's own lesions, with their assignments")
    reassign_every: int = option(600, "steps after which the scans' own lesions are assigned anew; 0 never")
    lambda_entropy: float = option(3.0, "weight of the cross-entropy with the assignments")
    lambda_dice: float = option(0.5, "weight of the soft Dice distance to the assignments")
    lambda_invariance: float = option(0.0, "weight of Eq. 8 between two acquisitions of a scene")
    lambda_visual: float = option(0.0, "weight of the relative visual consistency, Eq. 7, within the brain")
    ema_decay: float = option(0.995, "decay of the moving average of the weights, which is what is saved")
    preset: str = option("small", "the networks' size", SIZES)

    extendable: typing.ClassVar[bool] = False  # lesions are not assigned anew after the last step

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "frame", tuple(self.frame))
        rules = {
            "frame": (len(self.frame) == 3 and min(self.frame) >= 32, "three integers of at least 32"),
            "real_share": (0 <= self.real_share <= 1, "in [0, 1]"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "flips": (not self.flips, "off: brains are mirrored from left to right only, by their scenes"),
        }
        for name in (
            "diffusion_steps",
            "phantoms",
            "reassign_every",
            "lambda_entropy",
            "lambda_dice",
            "lambda_invariance",
            "lambda_visual",
        ):
            rules[name] = (getattr(self, name) >= 0, "at least 0")
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")


PRESETS[BrainConfig] = {size: {} for size in SIZES}

# networks by size: (background | brain), (brain | lesion)
NETWORKS = {
    "small": (
        {"channels": (8, 8, 16, 16), "strides": (2, 1, 2)},
        {"channels": (12, 24, 24, 48, 48, 64, 64, 96), "strides": (1, 2, 1, 2, 1, 2, 2)},
    ),
    "tiny": (
        {"channels": (4, 8, 8), "strides": (2, 2)},
        {"channels": (8, 16, 32, 48), "strides": (2, 2, 2)},
    ),
}


def diffusion_config(config: BrainConfig, folder: str) -> DiffusionConfig:
    """The options of the diffusion model's training, as far as they differ from the discovery's."""
    shared = {f.name for f in dataclasses.fields(TrainingConfig)} - {"max_steps", "preset", "learning_rate"}
    tiny = config.preset == "tiny"
    pushed = {"hub_model_id": f"{config.hub_model_id}-diffusion"} if config.hub_model_id else {}
    return DiffusionConfig(
        **{name: getattr(config, name) for name in shared}
        | {"output_dir": folder, "lr_schedule": "one_cycle"}
        | pushed,
        max_steps=config.diffusion_steps,
        preset="small",
        learning_rate=8e-4,
        ema_decay=0.99,
        width=8,
        sample_size=(16,) if tiny else (48,),
    )
