"""Convolutions of the UNet in the forms that suit an accelerator; the results are the same.

cuDNN's tensor core kernels need channel counts that are multiples of 8. The paper's network enters with 1 and continues
with 42 channels (the `small` preset with 10), for which cuDNN falls back to slow kernels. These channels are padded by
zeros.
"""

import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.models import cpu_kernels

MULTIPLE = 8


def convolve_unfolded(
    conv: nn.Conv3d, x: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """A convolution of few input channels with its taps along the last axis moved into the channels.

    Args:
        conv: with stride 1, zero padding of half its odd kernel size, and a bias.
        x: (B, C, H, W, D).
        memory_format: wanted for the output.

    Returns:
        (B, C', H, W, D): the output of `conv`, then channels of zeros up to a multiple of 8.
    """
    taps, (*margins, margin) = conv.kernel_size[2], conv.padding
    x = F.pad(x, (margin, margin)).unfold(4, taps, 1).movedim(-1, 2).flatten(1, 2)  # (B, C * taps, H, W, D)
    weight = conv.weight.movedim(-1, 2).flatten(1, 2)[..., None]
    missing = (-x.shape[1]) % MULTIPLE, (-len(weight)) % MULTIPLE
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing[0]))
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing[0], 0, missing[1]))
    weight = weight.contiguous(memory_format=memory_format)  # which is that of the output
    return F.conv3d(x, weight, F.pad(conv.bias, (0, missing[1])), padding=(*margins, 0))


def convolve(conv: nn.Module, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
    """Apply a convolution in the form that suits a device.

    On an accelerator, one over single voxels of a channels-last volume is a matrix product.

    Args:
        conv: an `nn.Conv3d` of odd kernel size that keeps the grid, or an `nn.Identity`.
        x: its input, or that with further channels of zeros, as [`convolve_unfolded`] returns it.
        with_bias: whether to add its bias.
    """
    if not isinstance(conv, nn.Conv3d):
        return conv(x)
    if torch.compiler.is_compiling():  # channels are not padded then
        return conv(x)
    missing = x.shape[1] - conv.in_channels
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else conv.weight
    bias = conv.bias if with_bias else None
    is_product = conv.kernel_size == (1, 1, 1) and x.is_contiguous(memory_format=torch.channels_last_3d)
    if is_product and not cpu_kernels.is_on_cpu(x):
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if with_bias and not missing:
        return conv(x)
    return F.conv3d(x, weight, bias, conv.stride, conv.padding)
