"""Extract the features of a scan at three decoder stages of a diffusion model.

python examples/features.py scan.nii.gz
"""

import sys

import torch

from diffdiscover3d import DiffusionFeaturePipeline, read_nifti

scan = read_nifti(sys.argv[1])  # in RAS+ orientation, with scan.affine for scan.data
pipe = DiffusionFeaturePipeline.from_pretrained("synthetic-regular")
out = pipe(scan.data, timestep=25, stages=(1, 2, 3), generator=torch.Generator().manual_seed(0), num_noise=4)
for stage, features in zip(out.stages, out.features, strict=True):
    print(f"stage {stage}: {tuple(features.shape)}")

fine = pipe(scan.data, stages=(3,), generator=torch.Generator().manual_seed(0), upsample=True).features[0]
print(f"stage 3 on the scan's {scan.data.shape} voxels: {tuple(fine.shape)}")
