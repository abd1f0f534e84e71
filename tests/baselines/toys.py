"""Small volumes on which the answer is known, and tiny settings of every trained baseline."""

import numpy as np
import torch

from diffdiscover3d.baselines.cicek import Cicek
from diffdiscover3d.baselines.hsu import Hsu
from diffdiscover3d.baselines.iic import IIC
from diffdiscover3d.baselines.jiang import Jiang
from diffdiscover3d.baselines.jule import Jule
from diffdiscover3d.baselines.nalepa import Nalepa
from diffdiscover3d.baselines.zhao import Zhao

GRID = (20, 24, 16)
# class, amount of labels, settings with which it trains for a second
TINY = {
    "nalepa": (Nalepa, "none", {"pool_patches": 300, "pretraining_steps": 4, "clustering_epochs": 1, "channels": 8}),
    "iic": (IIC, "none", {"steps": 4, "batch_size": 3, "max_shift": 2, "heads_alternate": 2}),
    "jule": (Jule, "none", {"num_patches": 80, "epochs": 1, "final_clusters": 8, "batch_size": 20}),
    "hsu": (Hsu, "none", {"steps": 3, "batch_size": 8, "cluster_voxels": 500, "parent_scale": 1.5}),
    "cicek": (Cicek, "slice", {"steps": 3, "crop": 16}),
    "zhao": (Zhao, "volume", {"registration_steps": 2, "appearance_steps": 2, "segmentation_steps": 2}),
    "jiang": (Jiang, "all", {"steps": 2, "crop": 16}),
}


def halves(noise: float, seed: int = 0, number: int = 0) -> dict:
    """A volume that is bright beyond a plane, with its parts as labels."""
    labels = np.zeros(GRID, dtype=np.int64)
    labels[:, 10 + number % 5 :] = 1
    values = labels + noise * np.random.default_rng(seed + number).standard_normal(GRID)
    values = (values - values.min()) / (values.max() - values.min())
    volume = torch.from_numpy(values.astype(np.float32))[None]
    return {"volume": volume, "labels": torch.from_numpy(labels), "name": f"halves-{number}"}


def many_halves(count: int, noise: float = 0.1) -> list[dict]:
    """Several of them, each with its plane elsewhere."""
    return [halves(noise, number=n) for n in range(count)]
