"""Building blocks of the diffusion UNet, named as in the paper's released network.

All of them take and return channels-first volumes (B, C, H, W, D).
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn


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


class ChannelLayerNorm(nn.Module):
    """Layer normalisation over the channels of each voxel (biased variance, eps 1e-5)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, eps=1e-5).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """conv-norm-SiLU twice, the time embedding added in between, the input added at the end."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int | None, norm_groups: int):
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(norm_groups, out_channels)
        self.time_projection = nn.Linear(time_channels, out_channels) if time_channels else None
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        hidden = F.silu(self.norm1(self.conv1(x)))
        if self.time_projection is not None:
            hidden = hidden + self.time_projection(F.silu(time))[:, :, None, None, None]
        hidden = F.silu(self.norm2(self.conv2(hidden)))
        return hidden + self.shortcut(x)


class _Attention(nn.Module, ABC):
    """Pre-normalised residual multi-head attention over all voxels; subclasses say how heads attend."""

    def __init__(self, channels: int, heads: int, head_dim: int, norm_after: bool):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = ChannelLayerNorm(channels)
        self.qkv = nn.Conv3d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv3d(heads * head_dim, channels, 1)
        self.norm_out = ChannelLayerNorm(channels) if norm_after else nn.Identity()

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Three times (B, heads, head_dim, voxels) to the same shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, grid = x.shape[0], x.shape[2:]
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, self.head_dim, -1)
        attended = self.attend(*qkv.unbind(1)).reshape(batch, self.heads * self.head_dim, *grid)
        return x + self.norm_out(self.out(attended))


class LinearAttention(_Attention):
    """Attention at a cost linear in the voxels: softmax of q over channels and of k over voxels."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__(channels, heads, head_dim, norm_after=True)

    def attend(self, q, k, v):
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, channels of k, channels of v)
        return context.transpose(-1, -2) @ (q.softmax(dim=-2) * self.head_dim**-0.5)


class FullAttention(_Attention):
    """Softmax attention between every pair of voxels; meant for the coarsest grid."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__(channels, heads, head_dim, norm_after=False)

    def attend(self, q, k, v):
        q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


ATTENTIONS = {"linear": LinearAttention, "full": FullAttention}
