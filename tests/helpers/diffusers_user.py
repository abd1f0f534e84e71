"""A script as a user of diffusers writes it, run by `tests/test_diffusers_user.py` against a Hub on this machine.

    python -m tests.helpers.diffusers_user FOLDER

Expected values are computed with diffusers, datasets and nibabel alone.
"""

import logging
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import diffdiscover3d
from diffdiscover3d import DiffusionFeaturePipeline, StructureDiscoveryModel, UNet3DModel, VolumeGenerationPipeline

from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler  # isort: skip

folder = Path(sys.argv[1])
warnings: list[str] = []


class Collect(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())


logging.getLogger("diffusers").addHandler(Collect(logging.WARNING))


def seeds(*numbers):
    return [torch.Generator("cpu").manual_seed(n) for n in numbers]


# embedded models by name, in every class
pipe = DiffusionFeaturePipeline.from_pretrained("synthetic-regular")
unet = UNet3DModel.from_pretrained("synthetic-regular", subfolder="unet")
parts = StructureDiscoveryModel.from_pretrained("synthetic-regular")
assert torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight) and parts.config.num_parts == 8

# push, and load by id without naming the class
pipe.push_to_hub("user/cells")
loaded = DiffusionPipeline.from_pretrained("user/cells")
assert type(loaded) is DiffusionFeaturePipeline
assert torch.equal(loaded.unet.conv_out.weight, pipe.unet.conv_out.weight)

# lists of paths, a generator for each, images aligned with the scans
rng = np.random.default_rng(0)
shapes, affines = [(20, 16, 12), (14, 18, 22)], [np.diag([-2.0, 1.0, 3.0, 1.0]), np.diag([1.0, 1.0, 1.5, 1.0])]
paths = [str(folder / f"scan{i}.nii.gz") for i in range(2)]
for path, shape, affine in zip(paths, shapes, affines, strict=True):
    nib.save(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine), path)
out = pipe(paths, timestep=25, stages=(1, 3), generator=seeds(3, 4), output_type="nifti")
single = pipe(paths[1], timestep=25, stages=(1, 3), generator=seeds(4)[0], output_type="nifti")
assert np.allclose(out.features[1][1].get_fdata(), single.features[1][0].get_fdata(), atol=1e-5)
for image, path in zip(out.features[1], paths, strict=True):
    scan = nib.as_closest_canonical(nib.load(path))
    ends = np.array([[0, 0, 0], np.array(image.shape[:3]) - 1])
    scan_ends = np.array([[0, 0, 0], np.array(scan.shape) - 1])
    found = nib.affines.apply_affine(image.affine, ends)
    assert np.allclose(found, nib.affines.apply_affine(scan.affine, scan_ends), atol=1e-4)  # the same corners
tensors = pipe(paths[0], generator=seeds(3)[0], stages=(1,), return_dict=False)
arrays = pipe(paths[0], generator=seeds(3)[0], stages=(1,), output_type="np").features[0]
assert isinstance(tensors, tuple) and np.array_equal(tensors[0][0].numpy(), arrays)

# sampling with another scheduler, against a hand-written loop
generate = VolumeGenerationPipeline.from_pipe(pipe)
generate.set_progress_bar_config(disable=True)
generate.scheduler = EulerDiscreteScheduler.from_config(generate.scheduler.config)
ours = generate(batch_size=2, num_inference_steps=3, generator=seeds(0, 1), output_type="np").volumes
scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(3)
sample = torch.cat([torch.randn(1, 1, 48, 48, 48, generator=g) for g in seeds(0, 1)]) * scheduler.init_noise_sigma
with torch.no_grad():
    for t in scheduler.timesteps:
        prediction = unet(scheduler.scale_model_input(sample, t), t.expand(2)).sample
        sample = scheduler.step(prediction, t, sample).prev_sample
assert np.allclose(ours, (sample.clamp(-1, 1) + 1).numpy() / 2, atol=1e-5)
try:
    generate.scheduler = FlowMatchEulerDiscreteScheduler()
    generate(num_inference_steps=2)
    raise SystemExit("a flow-matching scheduler was accepted")
except ValueError as error:
    assert "DDPM family" in str(error)

# callbacks, and the deterministic sampler with few steps
steps = []
generate.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
generate(
    num_inference_steps=2,
    callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append((step, int(timestep))) or tensors,
    callback_on_step_end_tensor_inputs=["latents"],
)
assert steps == [(0, 249), (1, 124)]

# half precision without warnings; memory options of diffusers
cells = diffdiscover3d.synthesize("regular", "test", 0).volume
expected = parts.segment(cells).labels
for dtype, least in ((torch.bfloat16, 0.995), (torch.float16, 0.999)):
    half = StructureDiscoveryModel.from_pretrained("synthetic-regular", dtype=dtype)
    assert (half.segment(cells).labels == expected).float().mean() > least
pipe.to(torch.bfloat16)
pipe.enable_attention_slicing()
assert pipe(paths[0], stages=(2,)).features[0].dtype == torch.float32
assert not warnings, warnings

# datasets: one column, tensors, streams
scans = diffdiscover3d.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
assert scans.column_names == ["name", "volume"]
row = scans.with_format("torch")[1]["volume"]
assert torch.equal(row, torch.from_numpy(nib.load(paths[1]).get_fdata(dtype=np.float32)))
stream = diffdiscover3d.load_dataset(str(folder), split="train", streaming=True).with_format("torch")
assert [tuple(row["volume"].shape) for row in stream] == shapes
print("all conventions hold")
