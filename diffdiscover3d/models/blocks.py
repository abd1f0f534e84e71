"""Building blocks of the diffusion UNet, with parameters named as in the paper's released network.

All of them take and return channels-first volumes (B, C, H, W, D).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.models import triton_norm
from diffdiscover3d.models.accelerator_convolutions import convolve
from diffdiscover3d.models.cpu_kernels import ChannelsLastNormSiLU, Conv3d, wants_channels_last_norm
from diffdiscover3d.models.fused_kernels import NATIVE, Kernels


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (frequencies 1 to 1/10000, sines then cosines) through a two-layer perceptron.

    (B,) timesteps give (B, 4 * width) embeddings.
    """

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.float()[:, None] * self.frequencies.float()[None, :]
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.gelu(self.linear_1(sinusoids)))


class NormSiLU(nn.GroupNorm):
    """Group norm and SiLU; parameters as of `nn.GroupNorm`."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels)
        self.kernels: Kernels = NATIVE

    def forward(
        self, x: torch.Tensor, addend: torch.Tensor | None = None, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """SiLU of the norm of `x`, plus `addend`; `offset` (C,) is added to `x` first."""
        if triton_norm.is_supported(x):
            return triton_norm.norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, addend, offset)
        if offset is not None:
            x = x + offset.to(x.dtype)[:, None, None, None]
        if wants_channels_last_norm(x):
            y = ChannelsLastNormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return y if addend is None else y + addend
        return self.kernels.norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, addend)


class ResidualBlock(nn.Module):
    """conv-norm-SiLU twice, the time embedding added in between, the input added at the end."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int | None, norm_groups: int):
        super().__init__()
        self.conv1 = Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm1 = NormSiLU(norm_groups, out_channels)
        self.time_projection = nn.Linear(time_channels, out_channels) if time_channels else None
        self.conv2 = Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(norm_groups, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            x: (B, C, H, W, D), or with further channels of zeros.
            time: (B, time channels) time embedding.
            shift: (B, out channels, 1, 1, 1) its projection, if it is computed already; see [`project_time`].
        """
        if self.time_projection is not None and shift is None:
            shift = self.time_projection(F.silu(time))[:, :, None, None, None]
        hidden = self.norm1(*self._convolve(self.conv1, x, shift))
        return self.norm2(*self._convolve(self.conv2, hidden, convolve(self.shortcut, x)))

    def _convolve(
        self, conv: nn.Conv3d, x: torch.Tensor, addend: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Arguments of the norm after a convolution, which adds the bias where its kernel can do so at no cost."""
        if triton_norm.is_supported(x):
            return convolve(conv, x, with_bias=False), addend, conv.bias
        return convolve(conv, x), addend, None


def project_time(blocks: Sequence[ResidualBlock], time: torch.Tensor) -> list[torch.Tensor]:
    """The time embedding's projection for each of many blocks, by one matrix product.

    On an accelerator this replaces several kernel launches per block.
    """
    weight = torch.cat([b.time_projection.weight for b in blocks])
    bias = torch.cat([b.time_projection.bias for b in blocks])
    channels = [len(b.time_projection.bias) for b in blocks]
    shifts = F.linear(F.silu(time), weight, bias).split(channels, dim=1)
    return [s.reshape(*s.shape, 1, 1, 1) for s in shifts]
