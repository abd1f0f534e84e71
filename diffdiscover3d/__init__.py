"""Unsupervised discovery of nested structures in 3D volumes with diffusion features.

Public names are imported on first access, so `import diffdiscover3d` is fast. It also makes the pipelines known to
diffusers, once that is imported: then `diffusers.DiffusionPipeline.from_pretrained` loads them.
"""

import contextlib
import importlib
from typing import TYPE_CHECKING

from diffdiscover3d.utils.import_hooks import after_import

__version__ = "0.1.0"

_MODULES = {
    "UNet3DModel": "models.unet_3d",
    "UNET_PRESETS": "models.unet_3d",
    "StructureDiscoveryModel": "models.structure_discovery",
    "load_authors_checkpoint": "models.authors_checkpoint",
    "DiffusionFeaturePipeline": "pipelines.diffusion_feature",
    "VolumeGenerationPipeline": "pipelines.generation",
    "region_consistency": "losses",
    "photometric_invariance": "losses",
    "load_dataset": "data.datasets.hf_datasets",
    "load_volumes": "data.loading",
    "read_nifti": "data.formats.nifti.reading",
    "synthesize": "data.datasets.synthetic",
    "fetch_snapshot": "hub.download",
    "push_folder": "hub.upload",
    "segment": "segmentation.driver",
    "discover": "workflows.discover",
    "DiscoverOutput": "workflows.discover_output",
    "evaluate": "evaluation.synthetic",
}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from diffdiscover3d.data.datasets.hf_datasets import load_dataset
    from diffdiscover3d.data.datasets.synthetic import synthesize
    from diffdiscover3d.data.formats.nifti.reading import read_nifti
    from diffdiscover3d.data.loading import load_volumes
    from diffdiscover3d.evaluation.synthetic import evaluate
    from diffdiscover3d.hub.download import fetch_snapshot
    from diffdiscover3d.hub.upload import push_folder
    from diffdiscover3d.losses import photometric_invariance, region_consistency
    from diffdiscover3d.models.authors_checkpoint import load_authors_checkpoint
    from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
    from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
    from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
    from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline
    from diffdiscover3d.segmentation.driver import segment
    from diffdiscover3d.workflows.discover import discover
    from diffdiscover3d.workflows.discover_output import DiscoverOutput


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_pipelines() -> None:
    """Import the pipelines, which register themselves with diffusers; `import diffusers` must not fail for it."""
    for name in ("diffusion_feature", "generation"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{__name__}.pipelines.{name}")


after_import("diffusers.pipelines.pipeline_utils", _register_pipelines)
