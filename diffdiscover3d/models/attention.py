"""Multi-head attention over the voxels of a volume, with parameters named as in the paper's released network.

All modules take and return channels-first volumes (B, C, H, W, D).
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from diffdiscover3d.models import cpu_kernels, mixed_precision
from diffdiscover3d.models.fused_kernels import NATIVE, Kernels

_MEMORY_SHARE = 0.25  # of the free memory that one attention may take
_MAX_SEGMENTS, _MIN_SEGMENT = 64, 4096


class ChannelLayerNorm(nn.Module):
    """Layer normalisation over the channels of each voxel (biased variance, eps 1e-5)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, eps=1e-5).movedim(-1, 1)


class _Attention(nn.Module, ABC):
    """Pre-normalised residual multi-head attention over all voxels; subclasses define how heads attend.

    On a CPU the computation is channels-first. On other devices it uses tokens, one per voxel, so that projections are
    plain matrix products and nothing is copied between layouts.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, norm_after: bool):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = ChannelLayerNorm(channels)
        self.qkv = nn.Conv3d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv3d(heads * head_dim, channels, 1)
        self.norm_out = ChannelLayerNorm(channels) if norm_after else nn.Identity()
        self.kernels: Kernels = NATIVE

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Three times (B, heads, head_dim, voxels) to the same shape."""

    @abstractmethod
    def attend_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised (B, N, C) tokens to the attention's output after its last projection, (B, N, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not cpu_kernels.is_on_cpu(x) and not torch.compiler.is_compiling():
            return self.forward_tokens(x)
        batch, grid = x.shape[0], x.shape[2:]
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, self.head_dim, -1)
        attended = self.attend(*qkv.unbind(1)).reshape(batch, self.heads * self.head_dim, *grid)
        return x + self.norm_out(self.out(attended))

    def forward_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The same function computed on tokens."""
        tokens = self.kernels.to_tokens(x, self.norm.weight, self.norm.bias)
        weight, bias = getattr(self.norm_out, "weight", None), getattr(self.norm_out, "bias", None)
        return self.kernels.add_tokens(x, self.attend_tokens(tokens), weight, bias)


class LinearAttention(_Attention):
    """Attention at a cost linear in the voxels: softmax of q over channels and of k over voxels.

    Queries, keys and values of a fine grid are many times larger than the volume itself. On an accelerator they are
    computed whole if they take at most a quarter of its free memory. Otherwise, and on a CPU, a grid of more than
    `chunk` voxels is processed in chunks that are recomputed in the backward pass. In float16 the whole form is not
    used: the weights of fine grids would underflow.

    Attributes:
        chunk: number of voxels of a chunk.
        always_chunk: use chunks on every device, whatever memory is free.
    """

    chunk = 2**14
    always_chunk = False

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__(channels, heads, head_dim, norm_after=True)
        self._fits: dict[tuple, bool] = {}
        head = torch.arange(heads * head_dim) // head_dim
        self.register_buffer("same_head", head[:, None] == head[None, :], persistent=False)

    def attend(self, q, k, v):
        return self._look_up(q, k.softmax(dim=-1) @ v.transpose(-1, -2))

    def attend_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, voxels, channels = tokens.shape
        width, segments = self.heads * self.head_dim, _segments(voxels)
        wq, wk, wv = self.qkv.weight.flatten(1).chunk(3)
        flat = tokens.reshape(-1, channels)
        q = self.kernels.query_weights(F.linear(flat, wq).view(-1, self.heads, self.head_dim))
        k, v = (F.linear(flat, w).view(batch, voxels, width) for w in (wk, wv))
        # sums over hundreds of thousands of voxels run in segments, or a GPU would compute them on few multiprocessors
        context = _Context.apply(k, v, self.same_head, self.head_dim**-0.5, segments)
        # The last projection is applied to the contexts instead of to the voxels. Since the query weights of each head
        # sum to one, adding a share of the bias to each head's values adds the bias to each voxel.
        values = F.linear(context.view(-1, width), self.out.weight.flatten(1), self.out.bias / self.heads)
        values = values.view(batch, width, channels)
        if segments > 1:
            values = values[:, None].expand(-1, segments, -1, -1).reshape(-1, width, channels)
        found = torch.bmm(q.view(batch * segments, -1, width), values)
        return found if segments == 1 else found.view(tokens.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        voxels = math.prod(x.shape[2:])
        if torch.compiler.is_compiling():  # the compiler fuses what would be large
            return super().forward(x)
        if cpu_kernels.is_on_cpu(x) or self.always_chunk:
            return super().forward(x) if voxels <= self.chunk else self.forward_chunks(x)
        return self.forward_tokens(x) if self._fits_whole(x, voxels) else self.forward_chunks(x)

    def forward_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """The same function on at most `chunk` voxels at a time, recomputed in the backward pass."""
        chunks = x.flatten(2)[..., None, None].split(self.chunk, dim=2)
        with torch.no_grad():  # the softmax does not depend on the shift of its exponents
            largest = torch.stack([self._project(c, 1).amax(dim=-1) for c in chunks]).amax(dim=0)[..., None]
        context, total = 0, 0
        for c in chunks:
            weighted, weights = _recomputed(self._gather, c, largest)
            context, total = context + weighted, total + weights
        context = context / total
        return torch.cat([_recomputed(self._answer, c, context) for c in chunks], dim=2).reshape(x.shape)

    def slice(self, voxels: int | None) -> None:
        """Use chunks of so many voxels on every device; `None` restores the default."""
        self.always_chunk, self.chunk = voxels is not None, voxels or type(self).chunk

    def _fits_whole(self, x: torch.Tensor, voxels: int) -> bool:
        """Decided once for each shape, so that a training does not change its way in the middle."""
        key = x.shape, x.dtype, x.device
        if key not in self._fits:
            dtype = mixed_precision.autocast_dtype(x.device) or x.dtype
            saved = 6 * self.heads * self.head_dim + 5 * x.shape[1]  # channels of the tensors kept for the backward
            needed = 2 * len(x) * voxels * saved * dtype.itemsize
            self._fits[key] = dtype != torch.float16 and needed <= _MEMORY_SHARE * mixed_precision.free_memory(x.device)
        return self._fits[key]

    def _gather(self, x: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's share of the context before division by the sum of all weights, and its sum of weights."""
        weights = (self._project(x, 1).float() - largest.float()).exp()
        values = self._project(x, 2).float()
        return weights @ values.transpose(-1, -2), weights.sum(dim=-1, keepdim=True)

    def _answer(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The output for the voxels of a chunk."""
        found = self._look_up(self._project(x, 0), context.to(x.dtype))
        return x + self.norm_out(self.out(found.reshape(x.shape[0], -1, *x.shape[2:])))

    def _look_up(self, q: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return context.transpose(-1, -2) @ (q.softmax(dim=-2) * self.head_dim**-0.5)

    def _project(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """Queries (0), keys (1) or values (2), (B, heads, head_dim, voxels)."""
        weight = self.qkv.weight.chunk(3)[which]
        return F.conv3d(self.norm(x), weight).reshape(x.shape[0], self.heads, self.head_dim, -1)


class _Context(torch.autograd.Function):
    """Sums of the values over the voxels, weighted by the softmax of the keys over the voxels.

    CUDA's softmax over an inner axis runs on few multiprocessors, and over the last axis it would need copies. Here the
    exponentials are computed in place, and the small result is divided by their sums instead of each of them. The mean
    of the values is subtracted first and added to the result: in bfloat16 the gradient of the keys would otherwise be
    the difference of two large numbers.
    """

    @staticmethod
    def forward(ctx, k, v, same_head, scale: float, segments: int) -> torch.Tensor:
        """See [`LinearAttention.attend_tokens`].

        Args:
            k, v: (B, N, C).
            same_head: (C, C) whether two channels belong to the same head; other sums are 0.
            scale: factor of the sums.
            segments: number of parts of the voxels that are summed separately first.

        Returns:
            (B, C of the keys, C of the values).
        """
        precise = torch.float64 if k.dtype == torch.float64 else torch.float32
        mean = v.mean(dim=1, keepdim=True)
        v = v - mean
        weights = (k - k.amax(dim=1, keepdim=True)).exp_()
        total = weights.sum(dim=1, dtype=precise)[..., None]
        found = torch.bmm(_cut(weights, segments).transpose(1, 2), _cut(v, segments))
        if segments > 1:
            found = found.view(-1, segments, *found.shape[1:]).sum(dim=1, dtype=precise)
        # a bool times a number is of the default type: only another type needs a cast, which is an operator more
        mask = same_head if precise == torch.get_default_dtype() else same_head.to(precise)
        centred, factors = found / total, mask * scale
        ctx.save_for_backward(weights, v, centred, factors, total)
        ctx.segments = segments
        return ((centred + mean) * factors).to(k.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        weights, v, centred, factors, total = ctx.saved_tensors
        gradient = gradient * factors / total
        of_total = (gradient * centred).sum(dim=-1)[:, None]  # times -1
        if ctx.segments > 1:
            gradient, of_total = (t.repeat_interleave(ctx.segments, dim=0) for t in (gradient, of_total))
        gradient, of_total = gradient.to(v.dtype), of_total.to(v.dtype)
        pieces = _cut(weights, ctx.segments)
        of_keys = torch.baddbmm(of_total, _cut(v, ctx.segments), gradient.transpose(1, 2), beta=-1).mul_(pieces)
        of_values = torch.bmm(pieces, gradient)
        if ctx.segments > 1:
            of_keys, of_values = of_keys.view(v.shape), of_values.view(v.shape)
        return of_keys, of_values, None, None, None


def _cut(tokens: torch.Tensor, segments: int) -> torch.Tensor:
    """(B, N, C) to (B * segments, N / segments, C)."""
    return tokens if segments == 1 else tokens.view(-1, tokens.shape[1] // segments, tokens.shape[2])


def _segments(voxels: int) -> int:
    """Into how many equal segments a sum over voxels is split: a power of two up to 64."""
    segments = 1
    while 2 * segments <= _MAX_SEGMENTS and voxels % (2 * segments) == 0 and voxels // (2 * segments) >= _MIN_SEGMENT:
        segments *= 2
    return segments


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

    def attend_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(tokens, self.qkv.weight.flatten(1)).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim) with contiguous rows, as flash needs
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(attended, self.out.weight.flatten(1), self.out.bias)


ATTENTIONS = {"linear": LinearAttention, "full": FullAttention}
