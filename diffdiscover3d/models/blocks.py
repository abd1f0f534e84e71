"""Building blocks of the diffusion UNet, named as in the paper's released network.

All of them take and return channels-first volumes (B, C, H, W, D).
"""

import contextlib
import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def precise_if_small(x: torch.Tensor, stride: int) -> AbstractContextManager:
    """Within it, volumes of few voxels are computed in float32 on a CPU, whatever autocast says.

    oneDNN's weight gradient of a 3³ convolution in bfloat16 is garbage, often NaN, where the first grid axis has two
    voxels (torch 2.13 on AVX-512). A network that halves its grid meets that if the axis is short enough.

    Args:
        x: (B, C, H, W, D) what enters the network.
        stride: by how much the network shrinks the grid.
    """
    if x.device.type == "cpu" and x.shape[2] <= 2 * stride:
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that is not slow for a single small volume on a CPU.

    torch hands a float32 batch of one with few voxels to its own loop instead of oneDNN, which takes several times as
    long (docs/speed.md). In inference this asks oneDNN itself; sums are the same but for their order.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or self._is_left_to_torch(x):
            return super().forward(x)
        where = self.padding, self.stride, self.dilation, self.groups
        return torch.mkldnn_convolution(x, self.weight, self.bias, *where)

    def _is_left_to_torch(self, x: torch.Tensor) -> bool:
        return (
            type(x) is not torch.Tensor  # fake tensors and proxies of those who trace
            or torch.jit.is_tracing()
            or x.device.type != "cpu"
            or x.ndim != 5
            or len(x) != 1
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or max(self.kernel_size) == 1  # a matrix product, at which torch is good
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        )

    @classmethod
    def adopt(cls, network: nn.Module) -> nn.Module:
        """Make the convolutions of somebody else's network such ones, in place; weights and their names stay."""
        for module in network.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = cls
        return network

    @classmethod
    def release(cls, network: nn.Module) -> nn.Module:
        """Make the convolutions of a network torch's own again, in place."""
        for module in network.modules():
            if type(module) is cls:
                module.__class__ = nn.Conv3d
        return network


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


class _ChannelsLastNormSiLU(torch.autograd.Function):
    """SiLU of a group norm, for volumes that lie channels-last in a CPU's memory.

    There torch's backward of the group norm walks through memory in strides and takes about as long as that of a
    convolution. It is given contiguous copies instead, which is several times faster, copies included; and only the
    input is kept for it, not what lies between norm and SiLU.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float):
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normed)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        x, sizes, groups = x.contiguous(), _sizes(x), ctx.groups
        normed = torch.native_group_norm(x, weight, bias, *sizes, groups, ctx.eps)[0]
        gradient = torch.ops.aten.silu_backward(gradient.contiguous(), normed)
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *sizes, groups, wanted)
        of_x = found[0].contiguous(memory_format=torch.channels_last_3d) if wanted[0] else None
        return of_x, found[1], found[2], None, None


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


class NormSiLU(nn.GroupNorm):
    """Group norm and SiLU; weights as of `nn.GroupNorm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
        if x.device.type == "cpu" and channels_last and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _ChannelsLastNormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(super().forward(x), inplace=not torch.is_grad_enabled())


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

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.norm1(self.conv1(x))
        if self.time_projection is not None:
            hidden = hidden + self.time_projection(F.silu(time))[:, :, None, None, None]
        hidden = self.norm2(self.conv2(hidden))
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
    """Attention at a cost linear in the voxels: softmax of q over channels and of k over voxels.

    Queries, keys and values of a fine grid are many times larger than the volume itself. Where there are more than
    `chunk` voxels they are made for a chunk of them at a time, and again in the backward pass, so that they never
    exist as a whole.
    """

    chunk = 2**14  # voxels

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__(channels, heads, head_dim, norm_after=True)

    def attend(self, q, k, v):
        return self._look_up(q, k.softmax(dim=-1) @ v.transpose(-1, -2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        voxels = math.prod(x.shape[2:])
        if voxels <= self.chunk or torch.compiler.is_compiling():  # a compiler fuses what would be large
            return super().forward(x)
        chunks = x.flatten(2)[..., None, None].split(self.chunk, dim=2)
        with torch.no_grad():  # the softmax does not depend on what is taken off its exponents
            largest = torch.stack([self._project(c, 1).amax(dim=-1) for c in chunks]).amax(dim=0)[..., None]
        context, total = 0, 0
        for c in chunks:
            weighted, weights = _recomputed(self._gather, c, largest)
            context, total = context + weighted, total + weights
        context = context / total
        return torch.cat([_recomputed(self._answer, c, context) for c in chunks], dim=2).reshape(x.shape)

    def _gather(self, x: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's share of the context, before it is divided by the sum of all weights, and its sum of weights."""
        weights = (self._project(x, 1).float() - largest.float()).exp()
        values = self._project(x, 2).float()
        return weights @ values.transpose(-1, -2), weights.sum(dim=-1, keepdim=True)

    def _answer(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What the voxels of a chunk get from the context."""
        found = self._look_up(self._project(x, 0), context.to(x.dtype))
        return x + self.norm_out(self.out(found.reshape(x.shape[0], -1, *x.shape[2:])))

    def _look_up(self, q: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return context.transpose(-1, -2) @ (q.softmax(dim=-2) * self.head_dim**-0.5)

    def _project(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """Queries (0), keys (1) or values (2), (B, heads, head_dim, voxels)."""
        weight = self.qkv.weight.chunk(3)[which]
        return F.conv3d(self.norm(x), weight).reshape(x.shape[0], self.heads, self.head_dim, -1)


def _recomputed(function, *tensors: torch.Tensor):
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False)


class FullAttention(_Attention):
    """Softmax attention between every pair of voxels; meant for the coarsest grid."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__(channels, heads, head_dim, norm_after=False)

    def attend(self, q, k, v):
        q, k, v = (x.transpose(-1, -2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


ATTENTIONS = {"linear": LinearAttention, "full": FullAttention}
