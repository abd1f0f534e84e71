"""Code that exists only because of how PyTorch behaves on a CPU. No other device runs it."""

import contextlib
import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def is_on_cpu(x: torch.Tensor) -> bool:
    """Whether code for a CPU is used for a tensor; the one place where the networks decide it."""
    return x.device.type == "cpu"


def precise_if_small(x: torch.Tensor, stride: int) -> AbstractContextManager:
    """Disable CPU autocast for tiny grids.

    oneDNN's bfloat16 weight gradient of a 3³ convolution is wrong, often NaN, where the first grid axis has two voxels
    (torch 2.13 on AVX-512). A network that halves its grid reaches such a grid if the axis is short enough.

    Args:
        x: (B, C, H, W, D) input of the network.
        stride: factor by which the network shrinks the grid.
    """
    if x.device.type == "cpu" and x.shape[2] <= 2 * stride:
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that calls oneDNN for a single small volume on a CPU.

    PyTorch computes a float32 batch of one with few voxels in its own loop instead of in oneDNN, which takes several
    times as long (docs/speed.md). In inference this class calls oneDNN directly. Results differ only in the order of
    summation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or self._is_left_to_torch(x):
            return super().forward(x)
        where = self.padding, self.stride, self.dilation, self.groups
        return torch.mkldnn_convolution(x, self.weight, self.bias, *where)

    def _is_left_to_torch(self, x: torch.Tensor) -> bool:
        return (
            type(x) is not torch.Tensor  # fake tensors and proxies under tracing
            or torch.jit.is_tracing()
            or x.device.type != "cpu"
            or x.ndim != 5
            or len(x) != 1
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or max(self.kernel_size) == 1  # a matrix product, which PyTorch computes fast
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        )

    @classmethod
    def adopt(cls, network: nn.Module) -> nn.Module:
        """Change the class of every `nn.Conv3d` of a network to this one, in place; parameters and names stay."""
        return _change_class(network, nn.Conv3d, cls)

    @classmethod
    def release(cls, network: nn.Module) -> nn.Module:
        """Undo [`adopt`], in place."""
        return _change_class(network, cls, nn.Conv3d)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that computes on contiguous copies of channels-last volumes while it is trained on a CPU.

    PyTorch's backward pass on channels-last memory is several times slower than that on copies, copies included.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if wants_channels_last_norm(x):
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last_3d)
        return super().forward(x)

    @classmethod
    def adopt(cls, network: nn.Module) -> nn.Module:
        """Change the class of every `nn.GroupNorm` of a network to this one, in place; parameters and names stay."""
        return _change_class(network, nn.GroupNorm, cls)


def _change_class(network: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> nn.Module:
    for module in network.modules():
        if type(module) is old:
            module.__class__ = new
    return network


class ChannelsLastNormSiLU(torch.autograd.Function):
    """SiLU of a group norm for channels-last volumes on a CPU.

    PyTorch's backward pass of the group norm accesses channels-last memory in strides and takes about as long as that
    of a convolution. On contiguous copies it is several times faster, copies included. Only the input is saved for the
    backward pass, not the output of the norm.
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


def wants_channels_last_norm(x: torch.Tensor) -> bool:
    """Whether [`ChannelsLastNormSiLU`] should replace PyTorch's group norm for this input."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return is_on_cpu(x) and channels_last and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])
