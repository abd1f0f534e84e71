"""What a training was made of, in a few characters: its data and its teacher, wherever they lie."""

import hashlib
from collections.abc import Sequence

import torch


def dataset_fingerprint(volumes: Sequence) -> str | None:
    """The fingerprint a dataset gives itself, `None` if it gives none."""
    fingerprint = getattr(volumes, "fingerprint", None)
    return fingerprint() if callable(fingerprint) else None


def weights_fingerprint(model: torch.nn.Module) -> str:
    """The sha256 over names, types, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
