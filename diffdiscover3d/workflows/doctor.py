"""Describe this machine and what `segment` would use on it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from diffdiscover3d import __version__
from diffdiscover3d.hub.registry import DEFAULT_MODEL, embedded_models
from diffdiscover3d.hub.resolve import choose_levels
from diffdiscover3d.hub.sources import model_levels
from diffdiscover3d.segmentation.driver import choose_device
from diffdiscover3d.utils.provenance import weights_sha256

_PACKAGES = (
    "torch", "diffusers", "accelerate", "monai", "huggingface-hub", "nibabel", "numpy", "scipy", "safetensors", "rich",
)  # fmt: skip
_LOW_MEMORY, _LOW_DISK = 2 * 2**30, 2**30


def examine(device: str = "auto", model: str = DEFAULT_MODEL) -> dict:
    """Collect versions, devices, memory, disk and cache; nothing is downloaded, no user or host is named.

    Args:
        device, model: as for [`segment`].

    Returns:
        JSON values: "versions", "system", "memory", "devices", "cache", "segment" (what would be used) and "problems",
        a list of sentences, empty if all is well.

    Raises:
        ValueError: for a device that is not available.
        ModelError: if the model has no such levels.
    """
    memory, problems = psutil.virtual_memory(), []
    versions = {"diffdiscover3d": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed; pip install {name}.")
    place = choose_device(device)
    embedded, known = embedded_models().get(model), model_levels(model)
    cache, here = Path(constants.HF_HUB_CACHE), Path.cwd()
    free = shutil.disk_usage(here).free
    if memory.available < _LOW_MEMORY:
        problems.append(f"only {_gib(memory.available)} GiB of memory are free; close other programs, or use --fast.")
    if free < _LOW_DISK:
        problems.append(f"only {_gib(free)} GiB of disk are free in {here}; choose another --output folder.")
    if not os.access(here, os.W_OK):
        problems.append(f"{here} cannot be written to; choose another --output folder.")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and torch.version.cuda:
        problems.append("CUDA_VISIBLE_DEVICES is empty, which hides all CUDA devices; unset it.")
    return {
        "versions": versions,
        "system": {
            "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "memory": {
            "total_gib": _gib(memory.total),
            "available_gib": _gib(memory.available),
            "disk_free_gib": _gib(free),
        },
        "devices": _devices(),
        "cache": {"folder": str(cache), "size_gib": _gib(_size(cache)), "offline": bool(constants.HF_HUB_OFFLINE)},
        "segment": {
            "device": str(place),
            "model": model,
            "levels": list(known),
            "default_level": choose_levels(model, known, None)[0],
            "weights_sha256": weights_sha256(embedded.folder) if embedded else None,
        },
        "problems": problems,
    }


def describe(found: dict) -> str:
    """The result of [`examine`] as text."""
    versions, system, memory = found["versions"], found["system"], found["memory"]
    cache, used = found["cache"], found["segment"]
    levels = f", levels {', '.join(map(str, used['levels']))}" if used["levels"] else ""
    default = f" (default {used['default_level']})" if used["levels"] else ""
    lines = [
        "Versions",
        *(f"  {name:16} {version or 'missing'}" for name, version in versions.items()),
        "Machine",
        f"  {system['platform']}, {system['cpu_cores']} cores, torch uses {system['threads']} of them",
        f"  memory: {memory['available_gib']} of {memory['total_gib']} GiB free; "
        f"disk here: {memory['disk_free_gib']} GiB free",
        "Devices",
        *(f"  {d['device']:8} {d['name']}" + (f", {d['memory_gib']} GiB" if d["memory_gib"] else "")
          for d in found["devices"]),
        "Cache of the Hub",
        f"  {cache['folder']}, {cache['size_gib']} GiB" + (", offline" if cache["offline"] else ""),
        "segment would use",
        f"  device {used['device']}, model {used['model']}{levels}{default}",
        "Problems",
        *(f"  {problem}" for problem in found["problems"] or ["none found"]),
    ]  # fmt: skip
    return "\n".join(lines)


def _devices() -> list[dict]:
    devices = [{"device": "cpu", "name": platform.processor() or platform.machine(), "memory_gib": None}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {"device": f"cuda:{index}", "name": properties.name, "memory_gib": _gib(properties.total_memory)}
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "memory_gib": None})
    return devices


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _gib(size: float) -> float:
    return round(size / 2**30, 2)
