"""Provenance of results: versions, hardware and hashes of weights."""

import importlib.metadata
import os
import platform
from pathlib import Path

from diffdiscover3d import __version__
from diffdiscover3d.utils.files import sha256

_PACKAGES = ("torch", "diffusers", "accelerate", "monai", "numpy", "scipy", "scikit-learn")


def describe_environment() -> dict:
    """Versions and hardware as JSON values, without user or host names."""
    import torch  # slow, and the other functions need none

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "diffdiscover3d": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
    }


def weights_sha256(folder: str | Path) -> dict[str, str]:
    """The sha256 of every safetensors file of a model folder, by relative path, excluding training checkpoints."""
    folder = Path(folder)
    files = {p.relative_to(folder): p for p in sorted(folder.rglob("*.safetensors"))}
    return {name.as_posix(): sha256(p) for name, p in files.items() if name.parts[0] != "checkpoints"}


def peak_memory_mib() -> float:
    """The peak resident memory of this process, in MiB."""
    try:
        import resource
    except ImportError:  # not available on Windows
        import psutil

        return round(psutil.Process().memory_info().rss / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)
