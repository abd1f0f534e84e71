"""Convolutions whose channel counts do not suit tensor cores, computed exactly with channels padded by zeros.

cuDNN's tensor core kernels need channel counts that are multiples of 8. The paper's network enters with 1 and continues
with 42 channels (the `small` preset with 10), for which cuDNN falls back to slow kernels: on an H100 half of the time
of a `small` training step was spent there (docs/speed.md).
"""

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE = 8


def convolve_unfolded(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """A convolution of few input channels with its taps along the last axis moved into the channels.

    Args:
        conv: with stride 1, zero padding of half its odd kernel size, and a bias.
        x: (B, C, H, W, D).

    Returns:
        (B, C', H, W, D): the output of `conv`, then channels of zeros up to a multiple of 8.
    """
    taps, (*margins, margin) = conv.kernel_size[2], conv.padding
    x = F.pad(x, (margin, margin)).unfold(4, taps, 1).movedim(-1, 2).flatten(1, 2)  # (B, C * taps, H, W, D)
    weight = conv.weight.movedim(-1, 2).flatten(1, 2)[..., None]
    missing = (-x.shape[1]) % MULTIPLE, (-len(weight)) % MULTIPLE
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing[0]))
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing[0], 0, missing[1]))
    return F.conv3d(x, weight, F.pad(conv.bias, (0, missing[1])), padding=(*margins, 0))


def convolve_padded(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to an input with further channels of zeros, as [`convolve_unfolded`] returns it."""
    if not isinstance(conv, nn.Conv3d) or x.shape[1] == conv.in_channels:
        return conv(x)
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, x.shape[1] - conv.in_channels))
    return F.conv3d(x, weight, conv.bias, conv.stride, conv.padding)
