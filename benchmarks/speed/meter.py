"""Counting what a computation asks of a machine, and what the machine can give: operations, bytes, peaks."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry, register_flop_formula

from benchmarks.speed.timing import interleave


@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def _count_convolution(x_shape, w_shape, *_args, out_shape=None, **_kwargs) -> int:
    """What the package's convolutions ask oneDNN for themselves; torch only knows its own way there."""
    return conv_flop_count(x_shape, w_shape, out_shape, transposed=False)


_MAKES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Tally:
    """What one part asks for.

    Attributes:
        flops: by the name of the type computed in; a multiplication and an addition count as two.
        bytes: read and written if every operator reads its inputs and writes its outputs once.
        least_seconds: the sum over the operators of the longer of computing and moving, at a machine's peaks.
        operators: how many.
    """

    flops: dict[str, float]
    bytes: float = 0
    least_seconds: float = 0
    operators: int = 0


class Meter(TorchDispatchMode):
    """Counts operations and bytes of every operator while it is active, for the part that is current.

    Args:
        peaks: of [`measure_peaks`], to add up the least time; without them it stays 0.
    """

    def __init__(self, peaks: dict | None = None):
        super().__init__()
        self.peaks, self.part = peaks, "all"
        self.parts: dict[str, Tally] = defaultdict(lambda: Tally(defaultdict(float)))

    @property
    def total_flops(self) -> float:
        return sum(sum(tally.flops.values()) for tally in self.parts.values())

    @property
    def total_bytes(self) -> float:
        return sum(tally.bytes for tally in self.parts.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._overloadpacket not in flop_registry and function is not torch.ops.prim.device.default:
            with self:  # what is made of other operators is counted by them, as FlopCounterMode does
                made = function.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = function(*args, **kwargs)
        flops = 0
        if function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
        moved = bytes_moved(function, args, kwargs, out)
        tally, kind = self.parts[self.part], computed_in(args)
        tally.flops[kind] += flops
        tally.bytes += moved
        tally.operators += 1
        if self.peaks:
            computing = flops / self.peaks["flop_per_second"].get(kind, self.peaks["flop_per_second"]["float32"])
            tally.least_seconds += max(computing, moved / self.peaks["bytes_per_second"])
        return out


def bytes_moved(function, args, kwargs, out) -> int:
    """Bytes of the inputs and outputs of an operator; views and empty memory move none."""
    if function._overloadpacket.__name__ in _MAKES_NOTHING:
        return 0
    aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
    if any(not alias.is_write for alias in aliases):  # a view
        return 0
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    if "copy_" in function._overloadpacket.__name__ or "fill_" in function._overloadpacket.__name__:
        inputs = inputs[1:]  # what is overwritten is not read
    return sum(map(_size, inputs)) + sum(map(_size, outputs))


def computed_in(args) -> str:
    """The name of the type of an operator's first tensor of numbers with a fraction."""
    for x in tree_leaves(args):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return str(x.dtype).removeprefix("torch.")
    return "float32"


def _size(x: torch.Tensor) -> int:
    """An expanded tensor is read from what is really there."""
    size = x.numel() * x.element_size()
    return size if x.is_meta else min(size, x.untyped_storage().nbytes())


def count_flops(computation: Callable[[], object]) -> float:
    """Floating-point operations of one call, backward pass included, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        computation()
    return counter.get_total_flops()


def measure_peaks(device: str = "cpu", rounds: int = 5, quick: bool = False) -> dict:
    """What the machine can do at best: matrix products and 3D convolutions in two precisions, copies of memory.

    The best of several shapes and rounds counts. Operations per second of a type are the better of product and
    convolution: a roofline is what the machine can do, not what one kernel does.
    """
    rates: dict[str, dict[str, float]] = {}
    side = 512 if quick else 2048 if device == "cpu" else 8192
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            products = {"matmul": (2 * side**3, lambda a=a, b=b: a @ b)}
            for channels, grid in ((32, 32), (64, 24), (128, 16)):
                if quick and channels > 32:
                    continue
                x = torch.randn(4, channels, grid, grid, grid, device=device, dtype=dtype)
                w = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype)
                x, w = (t.to(memory_format=torch.channels_last_3d) for t in (x, w))
                flops = 2 * 27 * channels**2 * 4 * grid**3
                products[f"convolution, {channels} channels, {grid}^3"] = (
                    flops,
                    lambda x=x, w=w: F.conv3d(x, w, padding=1),
                )
            seconds = interleave({k: f for k, (_, f) in products.items()}, rounds, 2, device)
            rates[name] = {k: products[k][0] / min(s) for k, s in seconds.items()}
        source = torch.zeros((2**24 if quick else 2**26), device=device)  # 256 MiB: no cache holds it
        target = torch.empty_like(source)
        copying = min(interleave({"copy": lambda: target.copy_(source)}, rounds, 2, device)["copy"])
    return {
        "flop_per_second": {name: max(found.values()) for name, found in rates.items()},
        "bytes_per_second": 2 * source.numel() * source.element_size() / copying,
        "gflop_per_second_of": {name: {k: v / 1e9 for k, v in found.items()} for name, found in rates.items()},
    }


@contextmanager
def watched(modules: Iterable[tuple[str, torch.nn.Module]], enter: Callable, leave: Callable) -> Iterator[None]:
    """Call `enter(name)` and `leave(name)` around the forward pass of every module named."""
    handles = []
    for name, module in modules:
        handles.append(module.register_forward_pre_hook(lambda m, i, n=name: enter(n)))
        handles.append(module.register_forward_hook(lambda m, i, o, n=name: leave(n)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
