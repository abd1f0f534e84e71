"""Normalisations and softmaxes of the UNet on an accelerator: PyTorch's own kernels, or fused by `torch.compile`.

Both forms take and return the type of their input (bfloat16 in mixed precision) and compute statistics in float32.
The native form calls one PyTorch operator per step. The compiled form reads each input and writes each output about
once; its functions are compiled with dynamic shapes, so that one compilation serves all levels of the network.

Shapes: volumes are (B, C, *grid), tokens (B, N, C) with one token per voxel.
"""

import functools
import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from diffdiscover3d.models import cpu_kernels

EPS = 1e-5  # of the layer norms


class Kernels(NamedTuple):
    """The functions, all differentiable.

    Attributes:
        norm_silu: (x, weight, bias, groups, eps, addend or None) to `silu(group_norm(x)) + addend`.
        to_tokens: (x, weight, bias) to the layer norm over the channels of a volume, as tokens.
        query_weights: (B, N, heads, head_dim) to their softmax over `head_dim`.
        key_weights: (B, N, C) to the numerators of their softmax over the tokens, in [0, 1], and the sums of these over
            the tokens, (B, C) in float32.
        add_tokens: (x, tokens, weight, bias) to `x` plus the layer norm of the tokens; no norm if `weight` is `None`.
    """

    norm_silu: "NormSiLUKernel"
    to_tokens: "Kernel"
    query_weights: "Kernel"
    key_weights: "PairKernel"
    add_tokens: "Kernel"


class Kernel(Protocol):
    def __call__(self, *tensors: torch.Tensor | None) -> torch.Tensor: ...


class PairKernel(Protocol):
    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class NormSiLUKernel(Protocol):
    def __call__(self, x, weight, bias, groups: int, eps: float, addend: torch.Tensor | None) -> torch.Tensor: ...


class _NormSiLU(torch.autograd.Function):
    """SiLU of a group norm plus an addend, which is added in place: the SiLU is not kept on its own."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, addend):
        x = x.contiguous()
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, normed, mean, rstd)
        ctx.sizes, ctx.addend_shape = sizes, None if addend is None else addend.shape
        y = F.silu(normed)
        return y if addend is None else y.add_(addend)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, normed, mean, rstd = ctx.saved_tensors
        of_addend = gradient.sum_to_size(ctx.addend_shape) if ctx.needs_input_grad[5] else None
        gradient = torch.ops.aten.silu_backward(gradient.contiguous(), normed)
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *ctx.sizes, wanted)
        return *found, None, None, of_addend


def _norm_silu(x, weight, bias, groups, eps, addend):
    # autocast computes group norms in float32 by a cast before the operator, which a function of our own bypasses
    is_native = x.dtype == weight.dtype and (addend is None or addend.dtype == x.dtype) and not cpu_kernels.is_on_cpu(x)
    if is_native and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _NormSiLU.apply(x, weight, bias, groups, eps, addend)
    y = F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=not torch.is_grad_enabled())
    return y if addend is None else y + addend


def _to_tokens(x, weight, bias):
    return F.layer_norm(x.flatten(2).transpose(1, 2), weight.shape, weight, bias, EPS)


def _query_weights(q):
    return q.softmax(dim=-1)


def _key_weights(k):
    # CUDA's softmax over an inner axis runs on few multiprocessors, and over the last axis it would need copies
    weights = (k - k.detach().amax(dim=1, keepdim=True)).exp()
    return weights, weights.sum(dim=1, dtype=torch.promote_types(k.dtype, torch.float32))


def _add_tokens(x, tokens, weight, bias):
    if weight is not None:
        tokens = F.layer_norm(tokens, weight.shape, weight, bias, EPS)
    return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


NATIVE = Kernels(_norm_silu, _to_tokens, _query_weights, _key_weights, _add_tokens)


# For the compiler: written in float32, from which it generates kernels that load and store the type of `x`.


def _norm_silu_float32(x, weight, bias, groups, eps, addend):
    y = F.silu(F.group_norm(x.float(), groups, weight.float(), bias.float(), eps))
    return (y if addend is None else y + addend.float()).to(x.dtype)


def _to_tokens_float32(x, weight, bias):
    tokens = x.flatten(2).transpose(1, 2).float()
    return F.layer_norm(tokens, weight.shape, weight.float(), bias.float(), EPS).to(x.dtype)


def _query_weights_float32(q):
    return q.float().softmax(dim=-1).to(q.dtype)


def _key_weights_float32(k):
    weights = (k.float() - k.detach().amax(dim=1, keepdim=True).float()).exp()
    return weights.to(k.dtype), weights.sum(dim=1)


def _add_tokens_float32(x, tokens, weight, bias):
    tokens = tokens.float()
    if weight is not None:
        tokens = F.layer_norm(tokens, weight.shape, weight.float(), bias.float(), EPS)
    return (x.float() + tokens.transpose(1, 2).unflatten(2, x.shape[2:])).to(x.dtype)


@functools.lru_cache(maxsize=2)
def compiled_kernels(dynamic: bool = True) -> Kernels:
    """The fused form; each function is compiled at its first call, which takes seconds.

    Args:
        dynamic: compile for all shapes at once. `False` compiles each shape for itself, which takes longer and may give
            faster kernels.
    """
    functions = (
        _norm_silu_float32,
        _to_tokens_float32,
        _query_weights_float32,
        _key_weights_float32,
        _add_tokens_float32,
    )
    # one function serves every level of a network: more shapes than the compiler allows for by default
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._inductor.config.compile_threads = 1  # a pool of processes takes longer to start than these few to compile
    return Kernels(*(torch.compile(f, dynamic=dynamic) for f in functions))
