"""Mixed precision and memory on an accelerator."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from diffdiscover3d.models import cpu_kernels


class _CastAll(torch.autograd.Function):
    """Copies of many tensors in another type, made by one operator, as are their gradients."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: torch.Tensor):
        ctx.set_materialize_grads(False)
        ctx.like = tensors
        copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch._foreach_copy_(copies, list(tensors))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor | None):
        given = [(g, t) for g, t in zip(gradients, ctx.like, strict=True) if g is not None]
        copies = [torch.empty_like(g, dtype=t.dtype) for g, t in given]
        if copies:
            torch._foreach_copy_(copies, [g for g, _ in given])
        found = iter(copies)
        return (None, *(None if g is None else next(found) for g in gradients))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's type on a device; `None` where it is not active."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def wants_cast_weights(x: torch.Tensor) -> bool:
    """Whether all weights should be cast at once for this input: under bfloat16 autocast on an accelerator."""
    if cpu_kernels.is_on_cpu(x) or torch.compiler.is_compiling():
        return False
    return autocast_dtype(x.device) == torch.bfloat16


@contextlib.contextmanager
def with_cast_weights(network: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within it, the network computes with copies of its weights in `dtype`, and autocast is disabled.

    Autocast casts weight by weight, and computes norms and softmaxes in float32 between two casts. Here all weights are
    cast by one operator, and norms and softmaxes take and return `dtype`; PyTorch's CUDA kernels compute their
    statistics in float32. Gradients reach the original weights, in their type.
    """
    places = [(m._parameters, name) for m in network.modules() for name, p in m._parameters.items() if p is not None]
    weights = [table[name] for table, name in places]
    cast = _CastAll.apply(dtype, *weights)
    try:
        for (table, name), copy in zip(places, cast, strict=True):
            table[name] = copy
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (table, name), weight in zip(places, weights, strict=True):
            table[name] = weight


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device: infinite on the meta device, 0 where it is unknown."""
    if device.type == "meta":
        return float("inf")
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
