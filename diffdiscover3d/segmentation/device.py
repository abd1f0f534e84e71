"""The device of a command."""

import re
from typing import TYPE_CHECKING

from diffdiscover3d.utils.processes import local_rank

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?|mps")


def is_device_name(name: str) -> bool:
    """Whether a device is spelled as one of those that commands take; it may be missing on this machine."""
    return _NAME.fullmatch(name) is not None


def choose_device(name: str) -> "torch.device":
    """The device of a name; "auto" is a CUDA device if there is one, otherwise the CPU.

    Raises:
        ValueError: if the device is unknown or missing on this machine.
    """
    if not is_device_name(name):
        raise ValueError(f"`device` must be auto, cpu, cuda, cuda:N or mps, got {name!r}.")
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # the processes of one launch share the devices of the machine
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    device = torch.device(name)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ValueError(f"`device` {name!r} is not available on this machine; use auto or cpu.")
    return device
