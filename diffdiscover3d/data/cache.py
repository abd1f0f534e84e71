"""Disk cache of preprocessed volumes, read back by memory mapping instead of decompressing and resampling again."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils.files import atomic_file

logger = logging.getLogger("diffdiscover3d")


def cache_folder() -> Path:
    """The cache folder: `$DIFFDISCOVER3D_CACHE`, or `diffdiscover3d` in the user's cache folder."""
    chosen = os.environ.get("DIFFDISCOVER3D_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffdiscover3d"


class CachedVolumes(Sequence):
    """A sequence of items that are computed on first access and memory-mapped from a file afterwards.

    Args:
        length: number of items.
        make: function that computes item i as a dict of tensors and JSON values. Called once for each i, in the first
            process that accesses it.
        key: JSON values that determine the result of `make`; each key has a separate cache.
        folder: folder of the cache files; default: [`cache_folder`]. If it cannot be written, items are computed on
            every access.
    """

    def __init__(self, length: int, make: Callable[[int], dict], key, folder: str | Path | None = None):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
        self.length, self.make = length, make
        self._digest = digest
        self.folder = Path(folder or cache_folder()) / digest
        self._writable = True

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        """Fingerprint of the key and the number of items."""
        return f"{self._digest} of {self.length}"

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        path = self.folder / f"{index:06d}.safetensors"
        if path.is_file():
            try:
                return _read(path)
            except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                logger.warning("%s: recomputing a damaged cache file (%s)", path, error)
        item = self.make(index)
        if self._writable:
            try:
                _write(path, item)
            except OutputError as error:
                self._writable = False
                logger.warning("volumes are not cached: %s", error)
        return item


def _write(path: Path, item: dict) -> None:
    tensors = {k: v.contiguous() for k, v in item.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in item.items() if k not in tensors}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"values": json.dumps(rest)})


def _read(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        values = json.loads((file.metadata() or {})["values"])
        return {**{k: file.get_tensor(k) for k in file.keys()}, **values}  # noqa: SIM118 - not a mapping
