"""What the package is measured against: the same mathematics done the direct way, and MONAI's diffusion UNet.

Nothing here is slowed down on purpose: each is what one writes from the paper, or what a library's users run.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.training.config import DiscoveryConfig


def upsample(features: torch.Tensor, grid: Sequence[int], extent: Sequence[int] | None = None) -> torch.Tensor:
    """All channels on the voxels, trilinear with corners aligned: (B, C, h, w, d) to (B, C, *grid).

    Args:
        extent: the grid the features span where it exceeds the voxels' at the far ends.
    """
    h, w, d = grid
    h_u = F.interpolate(features, size=tuple(extent or grid), mode="trilinear", align_corners=True)
    return h_u[:, :, :h, :w, :d]


def eq5(masks: torch.Tensor, h: torch.Tensor, relative: bool = False) -> torch.Tensor:
    """Eq. 5 as the paper states it, on a representation of the voxels: average and square part by part.

    Args:
        masks: (B, K, H, W, D) soft parts.
        h: (B, C, H, W, D).
        relative: divide by the variance of the whole volume.
    """
    total = 0
    for k in range(masks.shape[1]):
        m = masks[:, k : k + 1]
        z = (m * h).sum(dim=(2, 3, 4), keepdim=True) / m.sum(dim=(2, 3, 4), keepdim=True)
        total = total + (m * (z - h) ** 2).sum(dim=(1, 2, 3, 4))
    if relative:
        return (total / (h - h.mean(dim=(2, 3, 4), keepdim=True)).square().sum(dim=(1, 2, 3, 4))).mean()
    return (total / masks[0, 0].numel()).mean()


def eq5_from_features(masks: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Eq. 5 as the paper states it for features of several stages: all channels are upsampled first."""
    return eq5(masks, torch.cat([upsample(f, masks.shape[2:]) for f in features], dim=1))


def eq8(masks: torch.Tensor, masks_changed: torch.Tensor) -> torch.Tensor:
    """Eq. 8 as the paper states it, the Dice distance of all parts of a volume and of its photometric change."""
    axes = (1, 2, 3, 4)
    overlap = 2 * (masks * masks_changed).sum(dim=axes)
    return (1 - overlap / ((masks**2).sum(dim=axes) + (masks_changed**2).sum(dim=axes))).mean()


@torch.no_grad()
def hooked_features(
    unet: UNet3DModel, noisy: torch.Tensor, timestep: torch.Tensor, stages: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The features of the decoder stages by forward hooks on the whole network, and its prediction."""
    found: dict[int, torch.Tensor] = {}

    def keep(stage: int) -> Callable:
        return lambda module, inputs, output: found.__setitem__(stage, output)

    handles = [unet.up_levels[stage - 1].register_forward_hook(keep(stage)) for stage in stages]
    try:
        prediction = unet(noisy, timestep).sample
    finally:
        for handle in handles:
            handle.remove()
    return [found[stage] for stage in stages], prediction


def add_noise(scheduler, unet: UNet3DModel, volume: torch.Tensor, noise: torch.Tensor, timestep: int):
    """Eq. 2 for volumes in [0, 1] on the grid of the teacher, and the timesteps: both as the teacher takes them."""
    clean = 2 * volume - 1
    if unet.noise_grid is not None:
        clean = resize_volume(clean, unet.noise_grid)
    steps = torch.full((len(volume),), timestep, device=volume.device)
    return scheduler.add_noise(clean, noise, steps), steps


def padded_extent(unet: UNet3DModel, grid: Sequence[int]) -> tuple[int, ...]:
    """The grid that the features span: beyond the volume where the network pads to its stride."""
    if unet.config.sample_size is not None:
        return tuple(grid)
    return tuple(-(-n // unet.stride) * unet.stride for n in grid)


def direct_discovery_losses(
    unet: UNet3DModel, scheduler, network: StructureDiscoveryModel, batch: dict, config: DiscoveryConfig
) -> dict[str, torch.Tensor]:
    """The losses of section 3 the direct way: the whole teacher with hooks, all on the voxels, two passes of f.

    Args:
        batch: as a discovery training draws it; its noise is (B, timesteps, 1, h, w, d).
        config: of the training; one draw of noise for each timestep, no parent.
    """
    volume, grid = batch["volume"], tuple(batch["volume"].shape[2:])
    draws = list(batch["noise"].unbind(1))
    relative, terms = config.relative_consistency, {}
    gamma, inverted = (batch[name][:, None, None, None, None] for name in ("gamma", "inverted"))
    changed = torch.where(inverted, 1 - volume**gamma, volume**gamma)
    masks = network(volume).logits.softmax(dim=1)
    masks_changed = network(changed).logits.softmax(dim=1)
    if config.lambda_feature > 0:
        noisy, steps = add_noise(scheduler, unet, volume, draws.pop(0), config.timestep)
        features, _ = hooked_features(unet, noisy, steps, config.stages)
        spans = padded_extent(unet, grid)
        terms_of_stages = [eq5(masks, upsample(f, grid, spans), relative) for f in features]
        mean_or_sum = len(features) if relative else 1
        terms["feature"] = config.lambda_feature * sum(terms_of_stages) / mean_or_sum
    if config.lambda_visual > 0:
        terms["visual"] = config.lambda_visual * eq5(masks, volume, relative)
    if config.lambda_invariance > 0:
        terms["invariance"] = config.lambda_invariance * eq8(masks, masks_changed)
    if config.lambda_denoised > 0:
        found = []
        for timestep, draw in zip(config.denoised_timesteps, draws, strict=True):
            noisy, steps = add_noise(scheduler, unet, volume, draw, timestep)
            _, prediction = hooked_features(unet, noisy, steps, ())
            prediction = (prediction.clamp(-1, 1) + 1) / 2
            found.append(F.interpolate(prediction, size=grid, mode="trilinear", align_corners=False))
        terms["denoised"] = config.lambda_denoised * eq5(masks, torch.stack(found).mean(dim=0), relative)
    return {"loss": sum(terms.values()), **terms}


def monai_diffusion_unet(unet: UNet3DModel) -> nn.Module:
    """MONAI's `DiffusionModelUNet` of the same widths and depth, with attention where ours has it (and in the middle).

    Its decoder has a level and in every level a residual block more than ours; that is its design.
    """
    from monai.networks.nets import DiffusionModelUNet

    config = unet.config
    channels = tuple(config.width * m for m in config.channel_multipliers)
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_res_blocks=config.blocks_per_level,
        channels=channels,
        attention_levels=tuple(a is not None for a in config.attention),
        norm_num_groups=config.norm_groups,
        num_head_channels=tuple(min(config.attention_head_dim, c) for c in channels),
    )


class PlainStep:
    """One training step the plain way: loss, backward, clip to norm 1, Adam.

    Args:
        model: what is trained.
        loss: called without arguments; a scalar.
        bf16: run the forward pass under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor], bf16: bool = False, device: str = "cpu"):
        self.model, self.loss, self.bf16, self.device = model.train(), loss, bf16, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4)

    def __call__(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
