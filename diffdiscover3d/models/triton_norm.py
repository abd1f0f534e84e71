"""Group norm and SiLU of channels-last volumes on a CUDA GPU, in Triton.

PyTorch's group norm needs contiguous volumes, computes the statistics of each group on one multiprocessor, and leaves
the SiLU and the additions before and after it to further kernels. These kernels read channels-last volumes, as
convolutions write them, split the statistics over all multiprocessors, and add the bias of the convolution before and
the residual after in the same pass. All arithmetic is in float32. Sums are split in the same way on every run, so
results are deterministic. Statistics are sums of values and squares, rounded less than a volume in half precision.
"""

import functools
import logging
import math

import torch
from torch.autograd.function import once_differentiable

from diffdiscover3d.errors import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's own kernels are used instead
    triton = None

logger = logging.getLogger("diffdiscover3d")
_TILE = 4096  # elements of a volume that a program holds at a time
_CHANNELS = 64  # channels of a tile; more channels take more programs
_PROGRAMS = 1024  # wanted for a batch: several for each multiprocessor
_COMPILER = {"enable_fp_fusion": True}  # of products and sums; the default depends on Triton's version
_NO_ADDEND, _SHIFT, _VOLUME = range(3)


def is_supported(x: torch.Tensor) -> bool:
    """Whether [`norm_silu`] can be used: Triton, a CUDA GPU, half precision, channels-last memory, no compiler."""
    return (
        triton is not None
        and x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and not torch.compiler.is_compiling()
        and _compiles(x.device)
    )


@functools.lru_cache(maxsize=64)
def _compiles(device: torch.device) -> bool:
    """Whether Triton can compile for a GPU; it needs a C compiler, and supports recent GPUs only."""
    try:
        x = torch.zeros(1, 8, 4, 4, 4, device=device, dtype=torch.bfloat16)
        plan, partial = _Plan(x, 1, _TILE), x.new_empty((1, 1, 2, 8), dtype=torch.float32)
        where = {"HAS_OFFSET": False, **plan.tile}
        with torch.cuda.device_of(x):
            _sum_moments[plan.sums](x, x, partial, *plan.sizes, plan.steps, **where)
    except (torch.OutOfMemoryError, TimeoutError):  # that may pass
        raise
    except Exception as error:  # of the driver, the C compiler or Triton, of many kinds
        logger.warning("Triton cannot compile for %s, PyTorch's slower norms are used: %s", device, first_line(error))
        return False
    return True


def norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    addend: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(group_norm(x + offset)) + addend`, differentiable once.

    Args:
        x: (B, C, H, W, D) in channels-last memory.
        weight, bias: (C,) of the group norm.
        addend: (B, C, 1, 1, 1), or a volume like `x`.
        offset: (C,) bias of the convolution that computed `x` without it.

    Returns:
        (B, C, H, W, D) of the type of `x`, in channels-last memory.
    """
    return _NormSiLU.apply(x, weight, bias, groups, eps, addend, offset)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, addend, offset):
        kind = _NO_ADDEND if addend is None else _SHIFT if addend.shape[2:].numel() == 1 else _VOLUME
        if kind == _SHIFT:
            addend = addend.reshape(x.shape[:2]).contiguous()
        elif kind == _VOLUME:
            addend = addend.contiguous(memory_format=torch.channels_last_3d)
        y, statistics, sums = _forward(x, weight, bias, groups, eps, addend, offset, kind)
        ctx.save_for_backward(x, weight, bias, offset, statistics, sums)
        ctx.kind, ctx.groups = kind, groups
        ctx.addend_dtype = None if addend is None else addend.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, offset, statistics, sums = ctx.saved_tensors
        of_addend = gradient.to(ctx.addend_dtype) if ctx.kind == _VOLUME else None
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        of_x, of_channels = _backward(gradient, x, weight, bias, offset, statistics, sums, ctx.groups)
        if ctx.kind == _SHIFT:
            of_addend = of_channels[:, 2].to(ctx.addend_dtype)[:, :, None, None, None]
        of_bias, of_weight, _, of_offset = of_channels.sum(dim=0)
        wanted = ctx.needs_input_grad
        return (
            of_x if wanted[0] else None,
            of_weight.to(weight.dtype) if wanted[1] else None,
            of_bias.to(bias.dtype) if wanted[2] else None,
            None,
            None,
            of_addend,
            of_offset.to(offset.dtype) if wanted[6] else None,
        )


class _Plan:
    """How a volume is divided among programs.

    Attributes:
        tile: rows (voxels) and channels of a program's tile, and options of the compiler.
        sums: grid of the programs that sum: parts of the voxels, samples, parts of the channels.
        steps: tiles that each of them sums.
        tiles: grid of one program for each tile.
        groups: grid of one program for each sample and group.
        group: sizes of what a program of a group loads at a time.
    """

    def __init__(self, x: torch.Tensor, groups: int, tile: int):
        batch, channels, voxels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        width = min(_CHANNELS, triton.next_power_of_2(channels))
        rows, parts = max(1, tile // width), triton.cdiv(channels, width)
        self.splits = max(1, min(_PROGRAMS // (batch * parts), voxels // rows))
        self.steps = triton.cdiv(voxels, self.splits * rows)
        self.tile = {"ROWS": rows, "CHANNELS": width, **_COMPILER}
        self.sums, self.tiles = (self.splits, batch, parts), (triton.cdiv(voxels, rows), batch, parts)
        splits, size = min(64, triton.next_power_of_2(self.splits)), channels // groups
        self.groups, self.sizes = (batch, groups), (voxels, channels, groups, size)
        self.group = {"SPLITS": splits, "SIZE": triton.next_power_of_2(size), **_COMPILER}


def _forward(x, weight, bias, groups, eps, addend, offset, kind):
    plan, batch = _Plan(x, groups, _TILE), len(x)
    partial = x.new_empty((batch, plan.splits, 2, x.shape[1]), dtype=torch.float32)
    statistics = x.new_empty((batch, 2, groups), dtype=torch.float32)
    sums = x.new_empty((batch, x.shape[1]), dtype=torch.float32)
    y = torch.empty_like(x)
    fixed = {"HAS_OFFSET": offset is not None, **plan.tile}
    shift = x if offset is None else offset  # not read
    given = x if addend is None else addend
    with torch.cuda.device_of(x):
        _sum_moments[plan.sums](x, shift, partial, *plan.sizes, plan.steps, **fixed)
        _finish_moments[plan.groups](partial, statistics, sums, *plan.sizes, plan.splits, eps, **plan.group)
        _apply[plan.tiles](x, shift, weight, bias, statistics, given, y, *plan.sizes, ADDEND=kind, **fixed)
    return y, statistics, sums


def _backward(gradient, x, weight, bias, offset, statistics, sums, groups):
    plan, batch = _Plan(x, groups, _TILE // 2), len(x)
    partial = x.new_empty((batch, plan.splits, 3, x.shape[1]), dtype=torch.float32)
    means = x.new_empty((batch, 2, groups), dtype=torch.float32)
    of_channels = x.new_empty((batch, 4, x.shape[1]), dtype=torch.float32)
    of_x = torch.empty_like(x)
    fixed = {"HAS_OFFSET": offset is not None, **plan.tile}
    known = (gradient, x, x if offset is None else offset, weight, bias, statistics)
    found = (partial, weight, statistics, sums, means, of_channels)
    with torch.cuda.device_of(x):
        _sum_gradients[plan.sums](*known, partial, *plan.sizes, plan.steps, **fixed)
        _finish_gradients[plan.groups](*found, *plan.sizes, plan.splits, **plan.group)
        _apply_gradients[plan.tiles](*known, means, of_x, *plan.sizes, **fixed)
    return of_x, of_channels


if triton is not None:

    @triton.jit
    def _load(x, shift, row, channel, where, channels, HAS_OFFSET: tl.constexpr):
        """A tile of the volume in float32, with the convolution's bias."""
        values = tl.load(x + row[:, None] * channels + channel[None, :], mask=where, other=0.0).to(tl.float32)
        if HAS_OFFSET:
            bias = tl.load(shift + channel, mask=channel < channels, other=0.0).to(tl.float32)
            values = tl.where(where, values + bias[None, :], 0.0)
        return values

    @triton.jit(do_not_specialize=["voxels", "steps"])
    def _sum_moments(
        x, shift, partial, voxels, channels, groups, size, steps,
        HAS_OFFSET: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
        squares = tl.zeros([ROWS, CHANNELS], tl.float32)
        for step in range(steps):
            row = (split * steps + step) * ROWS + tl.arange(0, ROWS)
            where = (row < voxels)[:, None] & (channel < channels)[None, :]
            values = _load(x, shift, sample * voxels + row, channel, where, channels, HAS_OFFSET)
            total += values
            squares += values * values
        to = partial + (sample * tl.num_programs(0) + split) * 2 * channels + channel
        tl.store(to, tl.sum(total, axis=0), mask=channel < channels)
        tl.store(to + channels, tl.sum(squares, axis=0), mask=channel < channels)

    @triton.jit(do_not_specialize=["voxels", "splits"])
    def _finish_moments(
        partial, statistics, sums, voxels, channels, groups, size, splits, eps, SPLITS: tl.constexpr, SIZE: tl.constexpr
    ):
        sample, group = tl.program_id(0), tl.program_id(1)
        member = tl.arange(0, SIZE)
        channel = group * size + member
        total = tl.zeros([SPLITS, SIZE], tl.float32)
        squares = tl.zeros([SPLITS, SIZE], tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + tl.arange(0, SPLITS)
            where = (split < splits)[:, None] & (member < size)[None, :]
            at = partial + (sample * splits + split)[:, None] * 2 * channels + channel[None, :]
            total += tl.load(at, mask=where, other=0.0)
            squares += tl.load(at + channels, mask=where, other=0.0)
        of_channels = tl.sum(total, axis=0)
        count = size * voxels.to(tl.float32)
        mean = tl.sum(of_channels, axis=0) / count
        variance = tl.maximum(tl.sum(tl.sum(squares, axis=0), axis=0) / count - mean * mean, 0.0)
        tl.store(sums + sample * channels + channel, of_channels, mask=member < size)
        tl.store(statistics + sample * 2 * groups + group, mean)
        tl.store(statistics + (sample * 2 + 1) * groups + group, 1 / tl.sqrt(variance + eps))

    @triton.jit
    def _normalise(values, weight, bias, statistics, sample, channel, channels, groups, size):
        """Normalised values, what the SiLU receives, and per channel the weight and 1 / standard deviation."""
        inside = channel < channels
        at = statistics + sample * 2 * groups + channel // size
        mean = tl.load(at, mask=inside, other=0.0)
        inverse = tl.load(at + groups, mask=inside, other=0.0)
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        normed = (values - mean[None, :]) * inverse[None, :]
        shifted = normed * scale[None, :] + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        return normed, shifted, scale, inverse

    @triton.jit(do_not_specialize=["voxels"])
    def _apply(
        x, shift, weight, bias, statistics, addend, y, voxels, channels, groups, size,
        HAS_OFFSET: tl.constexpr, ADDEND: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(1).to(tl.int64)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        where = (row < voxels)[:, None] & (channel < channels)[None, :]
        values = _load(x, shift, sample * voxels + row, channel, where, channels, HAS_OFFSET)
        _, u, _, _ = _normalise(values, weight, bias, statistics, sample, channel, channels, groups, size)
        result = u * tl.sigmoid(u)
        at = (sample * voxels + row)[:, None] * channels + channel[None, :]
        if ADDEND == 1:
            of_channel = tl.load(addend + sample * channels + channel, mask=channel < channels, other=0.0)
            result += of_channel.to(tl.float32)[None, :]
        if ADDEND == 2:
            result += tl.load(addend + at, mask=where, other=0.0).to(tl.float32)
        tl.store(y + at, result.to(y.dtype.element_ty), mask=where)

    @triton.jit
    def _of_silu(gradient, u):
        """Gradient of the SiLU's input."""
        gate = tl.sigmoid(u)
        return gradient * gate * (1 + u * (1 - gate))

    @triton.jit(do_not_specialize=["voxels", "steps"])
    def _sum_gradients(
        gradient, x, shift, weight, bias, statistics, partial, voxels, channels, groups, size, steps,
        HAS_OFFSET: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        split, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        of_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
        of_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
        of_y = tl.zeros([ROWS, CHANNELS], tl.float32)
        for step in range(steps):
            row = (split * steps + step) * ROWS + tl.arange(0, ROWS)
            where = (row < voxels)[:, None] & (channel < channels)[None, :]
            values = _load(x, shift, sample * voxels + row, channel, where, channels, HAS_OFFSET)
            normed, u, _, _ = _normalise(values, weight, bias, statistics, sample, channel, channels, groups, size)
            at = (sample * voxels + row)[:, None] * channels + channel[None, :]
            given = tl.load(gradient + at, mask=where, other=0.0).to(tl.float32)
            found = _of_silu(given, u)
            of_bias += found
            of_weight += found * normed
            of_y += given
        to = partial + (sample * tl.num_programs(0) + split) * 3 * channels + channel
        tl.store(to, tl.sum(of_bias, axis=0), mask=channel < channels)
        tl.store(to + channels, tl.sum(of_weight, axis=0), mask=channel < channels)
        tl.store(to + 2 * channels, tl.sum(of_y, axis=0), mask=channel < channels)

    @triton.jit(do_not_specialize=["voxels", "splits"])
    def _finish_gradients(
        partial, weight, statistics, sums, means, of_channels, voxels, channels, groups, size, splits,
        SPLITS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """Per channel the gradients of the norm's bias and weight, of a shift of the output and of the offset."""
        sample, group = tl.program_id(0), tl.program_id(1)
        member = tl.arange(0, SIZE)
        channel = group * size + member
        inside = member < size
        of_bias = tl.zeros([SPLITS, SIZE], tl.float32)
        of_weight = tl.zeros([SPLITS, SIZE], tl.float32)
        of_y = tl.zeros([SPLITS, SIZE], tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + tl.arange(0, SPLITS)
            where = (split < splits)[:, None] & inside[None, :]
            at = partial + (sample * splits + split)[:, None] * 3 * channels + channel[None, :]
            of_bias += tl.load(at, mask=where, other=0.0)
            of_weight += tl.load(at + channels, mask=where, other=0.0)
            of_y += tl.load(at + 2 * channels, mask=where, other=0.0)
        bias_sum, weight_sum, y_sum = tl.sum(of_bias, axis=0), tl.sum(of_weight, axis=0), tl.sum(of_y, axis=0)
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        count = size * voxels.to(tl.float32)
        of_mean, of_spread = tl.sum(scale * bias_sum, axis=0) / count, tl.sum(scale * weight_sum, axis=0) / count
        tl.store(means + sample * 2 * groups + group, of_mean)
        tl.store(means + (sample * 2 + 1) * groups + group, of_spread)
        mean = tl.load(statistics + sample * 2 * groups + group)
        inverse = tl.load(statistics + (sample * 2 + 1) * groups + group)
        normed_sum = (tl.load(sums + sample * channels + channel, mask=inside, other=0.0) - voxels * mean) * inverse
        of_offset = inverse * (scale * bias_sum - voxels * of_mean - of_spread * normed_sum)
        to = of_channels + sample * 4 * channels + channel
        tl.store(to, bias_sum, mask=inside)
        tl.store(to + channels, weight_sum, mask=inside)
        tl.store(to + 2 * channels, y_sum, mask=inside)
        tl.store(to + 3 * channels, of_offset, mask=inside)

    @triton.jit(do_not_specialize=["voxels"])
    def _apply_gradients(
        gradient, x, shift, weight, bias, statistics, means, of_x, voxels, channels, groups, size,
        HAS_OFFSET: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(1).to(tl.int64)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        where = (row < voxels)[:, None] & (channel < channels)[None, :]
        values = _load(x, shift, sample * voxels + row, channel, where, channels, HAS_OFFSET)
        normed, u, scale, inverse = _normalise(
            values, weight, bias, statistics, sample, channel, channels, groups, size
        )
        at = (sample * voxels + row)[:, None] * channels + channel[None, :]
        found = _of_silu(tl.load(gradient + at, mask=where, other=0.0).to(tl.float32), u)
        of_group = means + sample * 2 * groups + channel // size
        of_mean = tl.load(of_group, mask=channel < channels, other=0.0)
        of_spread = tl.load(of_group + groups, mask=channel < channels, other=0.0)
        result = inverse[None, :] * (found * scale[None, :] - of_mean[None, :] - normed * of_spread[None, :])
        tl.store(of_x + at, result.to(of_x.dtype.element_ty), mask=where)
