"""Content hashes of datasets and weights, independent of their location."""

import hashlib
from collections.abc import Sequence

import torch


def dataset_fingerprint(volumes: Sequence) -> str | None:
    """The fingerprint of a dataset, or `None` if the dataset does not define one."""
    fingerprint = getattr(volumes, "fingerprint", None)
    return fingerprint() if callable(fingerprint) else None


def weights_fingerprint(model: torch.nn.Module) -> str:
    """The sha256 over names, types, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
