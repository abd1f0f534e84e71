"""The diffusion model: a 3D UNet whose decoder stages are the features of the method (Fig. 1)."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from diffdiscover3d.data.transforms import pad_to_multiple
from diffdiscover3d.models import cpu_kernels
from diffdiscover3d.models.accelerator_convolutions import convolve, convolve_unfolded
from diffdiscover3d.models.attention import ATTENTIONS, FullAttention, LinearAttention
from diffdiscover3d.models.blocks import ResidualBlock, TimeEmbedding, project_time
from diffdiscover3d.models.cpu_kernels import Conv3d, precise_if_small
from diffdiscover3d.models.fused_kernels import NATIVE, compiled_kernels
from diffdiscover3d.models.loading import StrictLoadingMixin
from diffdiscover3d.models.mixed_precision import wants_cast_weights, with_cast_weights


@dataclass
class UNet3DOutput(BaseOutput):
    """Output of [`UNet3DModel`].

    Attributes:
        sample: (B, C, H, W, D) prediction of the clean volume in [-1, 1]; `None` if it was not requested.
        features: one (B, c, h, w, d) map per requested decoder stage, in the requested order.
        extent: the grid (in voxels of the input) that the features span with corners aligned. It equals the
            input's grid, or exceeds it at the far ends where the input was padded to the stride.
    """

    # accelerate rebuilds outputs as `type(output)(dict)` under mixed precision: the others must default to None
    sample: torch.Tensor | None
    features: tuple[torch.Tensor, ...] | None = None
    extent: tuple[int, int, int] | None = None


class _Level(nn.Module):
    """Residual blocks, then attention, at one resolution of the encoder or the decoder."""

    def __init__(self, in_channels, out_channels, time_channels, attention, blocks, heads, head_dim, norm_groups):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, time_channels, norm_groups) for a, b in itertools.pairwise(widths)
        )
        self.attention = ATTENTIONS[attention](out_channels, heads, head_dim) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor, *shifts: torch.Tensor) -> torch.Tensor:
        for block, shift in itertools.zip_longest(self.blocks, shifts):
            x = block(x, time, shift)
        return self.attention(x)


class UNet3DModel(StrictLoadingMixin, ModelMixin, ConfigMixin):
    """3D UNet that predicts a clean volume from a noisy one and returns its decoder features.

    Decoder stage 1 is the coarsest (with four resolutions: 1/8 of the internal grid), the last stage the finest (1/2).
    With the defaults of `UNET_PRESETS["paper"]` it is the network released with the paper, layer by layer.

    Args:
        in_channels, out_channels: image channels.
        width: channels at the finest resolution; even and at least 4.
        channel_multipliers: channels at each resolution, finest first, as multiples of `width`.
        blocks_per_level: residual blocks at each resolution, in the encoder and in the decoder.
        attention: one of `None`, "linear", "full" for each resolution, finest first.
        attention_heads, attention_head_dim: heads of every attention and channels of each head.
        norm_groups: groups of GroupNorm; divides the channels of every resolution.
        sample_size: internal grid, an int or three. Inputs are resized to it and the prediction back (trilinear),
            as the authors do. `None`: inputs are padded to a multiple of `stride` instead.
        resize_before_noise: pipelines and trainings bring clean volumes to `sample_size` before they add
            noise, so that no noise is resampled. `False` is the authors' order: noise first.

    Raises:
        ValueError: if the channels of a resolution are not a multiple of `norm_groups`, if `attention` does not name
            every resolution, or if `sample_size` is no multiple of the stride.

    Example:
        >>> import torch
        >>> unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
        >>> out = unet(torch.zeros(1, 1, 9, 12, 7), torch.tensor([25]), stages=(1,))
        >>> out.sample.shape, out.features[0].shape
        (torch.Size([1, 1, 9, 12, 7]), torch.Size([1, 8, 5, 6, 4]))
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 4, 8),
        blocks_per_level: int = 2,
        attention: Sequence[str | None] = (None, None, None, None),
        attention_heads: int = 4,
        attention_head_dim: int = 32,
        norm_groups: int = 8,
        sample_size: int | Sequence[int] | None = None,
        resize_before_noise: bool = False,
    ):
        super().__init__()
        channels = [width * m for m in channel_multipliers]
        self.stride = 2 ** (len(channels) - 1)
        self.num_stages = len(channels) - 1
        _check_config(width, channels, attention, norm_groups, sample_size, resize_before_noise, self.stride)
        self.gradient_checkpointing = False

        time_channels = 4 * width
        level = (blocks_per_level, attention_heads, attention_head_dim, norm_groups)
        entry = width // 3 * 2
        self.time_embedding = TimeEmbedding(width)
        self.conv_in = Conv3d(in_channels, entry, 7, padding=3)

        self.down_levels, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip([entry, *channels[:-1]], channels, strict=True)):
            self.down_levels.append(_Level(a, b, time_channels, attention[i], *level))
            if i < self.num_stages:
                self.downsamples.append(nn.Conv3d(b, b, 4, stride=2, padding=1))

        self.mid_block1 = ResidualBlock(channels[-1], channels[-1], time_channels, norm_groups)
        self.mid_attention = FullAttention(channels[-1], attention_heads, attention_head_dim)
        self.mid_block2 = ResidualBlock(channels[-1], channels[-1], time_channels, norm_groups)

        self.up_levels, self.upsamples = nn.ModuleList(), nn.ModuleList()
        for i in range(self.num_stages, 0, -1):  # the skip of level i, whose channels are channels[i]
            self.up_levels.append(_Level(2 * channels[i], channels[i - 1], time_channels, attention[i - 1], *level))
            self.upsamples.append(nn.ConvTranspose3d(channels[i - 1], channels[i - 1], 4, stride=2, padding=1))

        self.final_block = ResidualBlock(channels[0], width, None, norm_groups)
        self.conv_out = nn.Conv3d(width, out_channels, 1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        stages: Sequence[int] = (),
        return_sample: bool = True,
    ) -> UNet3DOutput:
        """Predict the clean volume, and return the features of the requested decoder stages.

        Args:
            sample: (B, C, H, W, D) noisy volumes, in [-1, 1] before the noise; any H, W, D.
            timestep: (B,) or a scalar, in [0, T).
            stages: decoder stages whose feature maps are wanted, 1 (coarsest) to `num_stages` (finest).
            return_sample: `False` skips the prediction: the network then stops after the deepest requested stage.

        Raises:
            ValueError: if `sample` is not 5-D, a stage does not exist, or nothing is asked for.
        """
        if sample.ndim != 5:
            raise ValueError(f"`sample` must be (batch, channel, H, W, D), got shape {tuple(sample.shape)}.")
        wrong = [s for s in stages if not 1 <= s <= self.num_stages]
        if wrong:
            raise ValueError(f"`stages` must lie in 1..{self.num_stages}, got {wrong}.")
        if not stages and not return_sample:
            raise ValueError("nothing is asked for: name `stages` or set `return_sample=True`.")

        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        x, extent = self._to_internal_grid(sample)
        with self._mixed_precision(x):
            x, features = self._encode_and_decode(x, timestep, stages, return_sample)
        prediction = self._to_input_grid(x, sample.shape[2:]) if return_sample else None
        return UNet3DOutput(sample=prediction, features=tuple(features[s] for s in stages), extent=extent)

    def _encode_and_decode(self, x, timestep, stages, return_sample) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Encoder and decoder: the prediction on the internal grid, and the features of the decoder stages computed."""
        time = self.time_embedding(timestep)
        shifts = self._time_shifts(time)
        x = self._enter(x.to(self.conv_in.weight.dtype))
        skips = []
        for i, level in enumerate(self.down_levels):
            x = self._run(level, x, time, *shifts.get(level, ()))
            skips.append(x)
            if i < self.num_stages:
                x = self.downsamples[i](x)
        x = self._run(self.mid_block1, x, time, *shifts.get(self.mid_block1, ()))
        x = self.mid_attention(x)
        x = self._run(self.mid_block2, x, time, *shifts.get(self.mid_block2, ()))

        features = {}
        for stage, (level, upsample) in enumerate(zip(self.up_levels, self.upsamples, strict=True), start=1):
            x = self._run(level, torch.cat([x, skips.pop()], dim=1), time, *shifts.get(level, ()))
            features[stage] = x
            if not return_sample and stage == max(stages):
                return x, features
            x = upsample(x)
        return convolve(self.conv_out, self._run(self.final_block, x)), features

    def stage_channels(self, stage: int) -> int:
        """Channels of a decoder stage's feature map."""
        return self.config.width * self.config.channel_multipliers[self.num_stages - stage]

    @property
    def noise_grid(self) -> tuple[int, int, int] | None:
        """Grid to which clean volumes are brought before noise is added; `None` leaves them on their own."""
        return as_grid(self.config.sample_size) if self.config.resize_before_noise else None

    def fuse_kernels(self, enabled: bool = True, dynamic: bool = True) -> None:
        """Use norms and softmaxes fused by `torch.compile` on an accelerator; see [`compiled_kernels`].

        They are compiled at the first forward pass, in seconds, and serve all blocks. A CPU ignores them.
        """
        kernels = compiled_kernels(dynamic) if enabled else NATIVE
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels

    def set_attention_slice(self, slice_size: str | int | None) -> None:
        """Compute linear attention on slices of the volume, for `pipe.enable_attention_slicing()`.

        Full attention is PyTorch's `scaled_dot_product_attention`, which needs no slices.

        Args:
            slice_size: voxels of a slice; "auto": 16384, "max" (saves most): 4096, `None`: slices only where the free
                memory is short.

        Raises:
            ValueError: if it is none of these.
        """
        voxels = {"auto": LinearAttention.chunk, "max": 2**12}.get(slice_size, slice_size)
        if voxels is not None and (not isinstance(voxels, int) or voxels < 1):
            raise ValueError(f"`slice_size` must be auto, max, None or a number of voxels, got {slice_size!r}.")
        for module in self.modules():
            if isinstance(module, LinearAttention):
                module.slice(voxels)

    def _mixed_precision(self, x: torch.Tensor) -> AbstractContextManager:
        # recomputation in the backward pass would find the weights in their own type
        if wants_cast_weights(x) and not self._recomputes():
            return with_cast_weights(self, torch.bfloat16, x.device)
        return precise_if_small(x, self.stride)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        if cpu_kernels.is_on_cpu(x) or torch.compiler.is_compiling():
            return self.conv_in(x)
        # the weight of a convolution with one input channel has no memory format of its own
        inner = self.down_levels[0].blocks[0].conv2.weight
        is_last = inner.is_contiguous(memory_format=torch.channels_last_3d)
        return convolve_unfolded(self.conv_in, x, torch.channels_last_3d if is_last else torch.contiguous_format)

    def _time_shifts(self, time: torch.Tensor) -> dict[nn.Module, Sequence[torch.Tensor]]:
        """The time embedding's projection for each block, by resolution; empty on a CPU, where blocks compute it.

        One product for all blocks sums in another order, and on a CPU it is not faster.
        """
        if cpu_kernels.is_on_cpu(time) or torch.compiler.is_compiling():
            return {}
        owners = [*self.down_levels, self.mid_block1, self.mid_block2, *self.up_levels]
        blocks = [[m] if isinstance(m, ResidualBlock) else list(m.blocks) for m in owners]
        shifts = iter(project_time(list(itertools.chain(*blocks)), time))
        return {owner: [next(shifts) for _ in group] for owner, group in zip(owners, blocks, strict=True)}

    def _recomputes(self) -> bool:
        return torch.is_grad_enabled() and self.gradient_checkpointing

    def _run(self, module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        return self._gradient_checkpointing_func(module, *args) if self._recomputes() else module(*args)

    def _to_internal_grid(self, sample: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        grid = tuple(sample.shape[2:])
        if self.config.sample_size is not None:
            return _resize(sample, as_grid(self.config.sample_size)), grid
        sample = pad_to_multiple(sample, self.stride)
        return sample, tuple(sample.shape[2:])

    def _to_input_grid(self, sample: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        if self.config.sample_size is not None:
            return _resize(sample, tuple(grid))
        h, w, d = grid
        return sample[:, :, :h, :w, :d]


def as_grid(size: int | Sequence[int]) -> tuple[int, int, int]:
    """An int or a sequence of three as a grid of three."""
    return (size,) * 3 if isinstance(size, int) else tuple(size)


def _resize(sample: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    if tuple(sample.shape[2:]) == grid:
        return sample
    return F.interpolate(sample, size=grid, mode="trilinear", align_corners=False)


def _check_config(width, channels, attention, norm_groups, sample_size, resize_before_noise, stride) -> None:
    if width < 4 or width % 2:
        raise ValueError(f"`width` must be even and at least 4, got {width}.")
    uneven = [c for c in channels if c % norm_groups]
    if uneven:
        raise ValueError(f"all channels must be a multiple of `norm_groups`={norm_groups}, got {uneven}.")
    if len(attention) != len(channels):
        raise ValueError(f"`attention` needs an entry for each of {len(channels)} resolutions, got {len(attention)}.")
    unknown = [a for a in attention if a is not None and a not in ATTENTIONS]
    if unknown:
        raise ValueError(f"`attention` entries must be None or one of {sorted(ATTENTIONS)}, got {unknown}.")
    if sample_size is None and resize_before_noise:
        raise ValueError("`resize_before_noise` needs a `sample_size` to resize to.")
    if sample_size is not None:
        sizes = as_grid(sample_size)
        for size in sizes:
            if size < stride or size % stride:
                better = max(1, -(-size // stride)) * stride
                raise ValueError(f"`sample_size` must be a multiple of {stride}, got {size}; try {better}.")


# `paper` is the released network of the authors; `small` is estimated to train on two CPU cores in 32 minutes
# (benchmarks/results/recipe.json).
UNET_PRESETS: dict[str, dict] = {
    "paper": {
        "width": 64,
        "channel_multipliers": (1, 2, 4, 8),
        "attention": ("linear", "linear", "linear", "linear"),
        "sample_size": 64,
    },
    # the paper's network on the grid it gives for BraTS; noise is added there, at its full strength
    "brats": {
        "width": 64,
        "channel_multipliers": (1, 2, 4, 8),
        "attention": ("linear", "linear", "linear", "linear"),
        "sample_size": 128,
        "resize_before_noise": True,
    },
    "small": {
        "width": 16,
        "channel_multipliers": (1, 2, 4, 4),
        "attention": (None, None, None, None),
        "sample_size": 48,
        "resize_before_noise": True,
    },
}
