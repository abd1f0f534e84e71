"""Learning rate schedules, as functions of the step alone."""

import dataclasses
import functools
import math
from collections.abc import Callable

from diffdiscover3d.training.config import TrainingConfig

EXTENDABLE_SCHEDULES = ("constant", "constant_with_warmup")  # whose rates do not depend on the number of steps


def settle_epochs(config: TrainingConfig, num_volumes: int) -> TrainingConfig:
    """The config with `num_train_epochs` replaced by `max_steps`.

    The last batch of an epoch is full: it is completed with volumes of the next epoch.
    """
    if config.num_train_epochs is None:
        return config
    steps = config.num_train_epochs * math.ceil(num_volumes / config.batch_size)
    return dataclasses.replace(config, max_steps=steps, num_train_epochs=None)


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    `one_cycle` is a linear warm-up over `lr_warmup_steps` (default: 10 % of the steps) and a cosine down to 1/1000; the
    others are those of diffusers' `get_scheduler`.
    """
    if config.lr_schedule == "constant":
        return config.learning_rate
    if config.lr_schedule != "one_cycle":
        factor = _factor(config.lr_schedule, config.lr_warmup_steps or 0, config.max_steps, config.learning_rate)
        return config.learning_rate * factor(step)
    warmup = max(1, config.max_steps // 10 if config.lr_warmup_steps is None else config.lr_warmup_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    return config.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


@functools.lru_cache(maxsize=8)
def _factor(name: str, warmup: int, steps: int, rate: float) -> Callable[[int], float]:
    """The factor of the learning rate by step, from diffusers."""
    import torch
    from diffusers.optimization import get_scheduler

    # only the factor is used: a scheduler prepared by accelerate would advance once per process
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    return scheduler.lr_lambdas[0]
