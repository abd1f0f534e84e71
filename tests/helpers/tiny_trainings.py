"""Trainings of a few steps on small volumes, for tests of their steps on a GPU, simulated or real."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.brain_config import BrainConfig
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.discovery import DiscoveryTraining

TINY = {"width": 8, "channel_multipliers": (1, 2, 4), "attention": ("linear", "linear", None), "norm_groups": 4}
GRID = (16, 24, 8)
STEPS = 6  # of both phases of a brain training


class Volumes:
    """Six volumes: a smooth background with two bright boxes."""

    def __init__(self):
        coarse = torch.rand(6, 1, 4, 6, 2, generator=torch.Generator().manual_seed(0))
        found = F.interpolate(coarse, GRID, mode="trilinear")
        found[:, :, 2:7, 3:9, 1:4] += 1.5
        found[:, :, 10:14, 12:20, 3:7] += 2
        low, high = found.amin(dim=(2, 3, 4), keepdim=True), found.amax(dim=(2, 3, 4), keepdim=True)
        self.volumes = (found - low) / (high - low)
        self.shapes = [GRID] * 6

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"volume": self.volumes[range(6)[index]]}


def losses_in(folder):
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()])


def make_diffusion(config, accelerator):
    return DiffusionTraining(config, GRID)


def make_discovery(config, accelerator, **models):
    torch.manual_seed(0)
    teacher = DiffusionFeaturePipeline(UNet3DModel(**TINY), make_scheduler(250))
    return DiscoveryTraining(config, teacher, Volumes(), [Volumes()[0]], accelerator, **models)


def make_nested(config, accelerator):
    torch.manual_seed(1)
    parent = StructureDiscoveryModel(2, norm="instance", dropout=0.0)
    return make_discovery(config, accelerator, parent=parent)


def brain_config(folder, scans, make_nifti, **options):
    """A training of both phases on two scans, which are written unless they are there."""
    for index in () if scans.exists() else (0, 3):
        volume = brain_phantom("test", index).volume[::2, ::2, ::2]
        make_nifti(scans / f"{index}.nii.gz", (volume * 200).astype(np.float32), np.diag([3.0, 3, 3, 1]))
    fixed = {
        "preset": "tiny", "dataset": str(scans), "frame": (32, 40, 36), "phantoms": 0, "max_steps": STEPS,
        "diffusion_steps": STEPS, "batch_size": 2, "reassign_every": 5, "preview_every": 0, "log_every": 1,
        "mixed_precision": "no", "memory_format": "contiguous", "lambda_invariance": 0.1, "lambda_visual": 0.1,
    }  # fmt: skip
    return BrainConfig(output_dir=str(folder), **{**fixed, **options})
