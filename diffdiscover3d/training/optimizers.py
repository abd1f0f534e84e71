"""The optimiser of a training."""

from collections.abc import Iterable

import torch

from diffdiscover3d.training.config import TrainingConfig

SKIPS_ON_DEVICE = ("cpu", "cuda", "xpu")  # where the fused optimiser heeds `found_inf`; on mps it does not


def make_optimizer(
    config: TrainingConfig, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Adam, or AdamW if there is weight decay; with 8-bit moments if the config has `use_8bit_adam`.

    Raises:
        ValueError: if 8-bit moments are not possible here.
    """
    shared = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.adam_weight_decay:
        shared["weight_decay"] = config.adam_weight_decay
    if config.use_8bit_adam:
        check_8bit_adam(config, device)
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit if config.adam_weight_decay else bitsandbytes.optim.Adam8bit
        return kind(parameters, **shared)
    kind = torch.optim.AdamW if config.adam_weight_decay else torch.optim.Adam
    return kind(parameters, **shared, fused=device.type in SKIPS_ON_DEVICE)


def check_8bit_adam(config: TrainingConfig, device: torch.device) -> None:
    """Raise ValueError if `use_8bit_adam` is set and cannot be used: without a CUDA GPU or bitsandbytes."""
    if not config.use_8bit_adam:
        return
    if device.type != "cuda":
        raise ValueError(f"`use_8bit_adam` requires a CUDA GPU, got the device {device.type}; leave it out.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "`use_8bit_adam` requires bitsandbytes, which is not installed; pip install diffdiscover3d[bitsandbytes]."
        ) from error


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser skips a step by itself if its attribute `found_inf` is set, without synchronising."""
    return any(group.get("fused") for group in optimizer.param_groups)
