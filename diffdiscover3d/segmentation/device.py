"""The device of a command."""

import os

import torch


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is a CUDA device if there is one, otherwise the CPU.

    Raises:
        ValueError: if the device is unknown or missing on this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # the processes of one launch share the devices of the machine
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be auto, cpu, cuda, cuda:N or mps, got {name!r}.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ValueError(f"`device` {name!r} is not available on this machine; use auto or cpu.")
    return device
