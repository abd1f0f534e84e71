"""Operations of the trainings of the preset `paper` on a GPU: an estimate from counts, not a measurement.

Operations are counted on torch's meta device, which computes shapes and nothing else, so a network of any size is
counted in a second. The seconds follow from a rate that is assumed.
"""

import torch
import torch.nn.functional as F

from benchmarks.speed.meter import count_flops
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config

DENSE_BF16 = 990e12  # operations per second an H100 is sold with; nothing reaches it
ASSUMED_FRACTIONS = (0.1, 0.2, 0.4)
LEVELS = {2: 1, 4: 2, 8: 3}  # number of parts: decoder stage
GRID = 50  # of the paper's synthetic volumes


def training_step_flops(model: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Operations of forward and backward of a model on meta tensors."""

    def step() -> None:
        output = model(*inputs)
        output = output.sample if hasattr(output, "sample") else output
        F.l1_loss(output, torch.zeros_like(output)).backward()

    return count_flops(step)


def estimate() -> dict:
    """Operations of each part of the recipe, and hours at the assumed fractions of a H100's rate."""
    diffusion, discovery = make_config(DiffusionConfig), make_config(DiscoveryConfig)
    side, batch = UNET_PRESETS["paper"]["sample_size"], diffusion.batch_size
    with torch.device("meta"):
        unet = UNet3DModel(**UNET_PRESETS["paper"])
        volume, noise_step = torch.zeros(batch, 1, side, side, side), torch.zeros(batch)
        parts = {"diffusion": {"steps": diffusion.max_steps}}
        parts["diffusion"]["flop_of_a_step"] = training_step_flops(unet, volume, noise_step)
        unet.eval().requires_grad_(False)
    padded = -(-GRID // 8) * 8  # the network pads to its stride
    for num_parts, stage in LEVELS.items():
        # made on the CPU: its constructor computes the stride; the weights then become meta tensors
        network = StructureDiscoveryModel(num_parts).network.to("meta")
        with torch.device("meta"):
            teacher = count_flops(lambda s=stage: unet(volume, noise_step, stages=(s,), return_sample=False))
            views = torch.zeros(discovery.batch_size, 1, padded, padded, padded)
            of_network = 2 * training_step_flops(network, views)  # the volume and its photometric change
        parts[f"discovery, {num_parts} parts from stage {stage}"] = {
            "steps": discovery.max_steps,
            "flop_of_a_step": teacher + of_network,
            "of_the_teacher": teacher,
        }
    total = sum(part["steps"] * part["flop_of_a_step"] for part in parts.values())
    hours = {f"{fraction:.0%}": total / (fraction * DENSE_BF16) / 3600 for fraction in ASSUMED_FRACTIONS}
    return {
        "kind": "estimate from counted operations; no GPU was measured",
        "recipe": f"UNET_PRESETS['paper'], batches of {batch}, micro-batches counted once; discovery of three levels",
        "assumed_dense_bf16_flop_per_second": DENSE_BF16,
        "parts": parts,
        "total_flop": total,
        "hours_at_fraction_of_dense_bf16": hours,
    }
