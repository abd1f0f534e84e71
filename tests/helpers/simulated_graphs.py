"""CUDA graphs of a GPU that is simulated on the CPU; see `simulated_gpu`.

A captured graph is the list of operators that were run. A replay runs them again on the same memory, and no Python
code, so whatever Python computed at the capture, such as random numbers of the host, is repeated. Random numbers of the
GPU's default generator are drawn anew. As a GPU refuses after an invalid operation, so does the rest of the capture.

Differences from CUDA graphs: a real replay reads memory that was freed after the capture, and this one raises an error.
Each tensor of a capture has memory of its own, which neither other tensors of the capture nor graphs that share a pool
overwrite. A failed capture leaves the current stream, the allocator and the default generator as they were.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SimulatedGPU:
    """The state of the GPU.

    Attributes:
        graphs: what was captured, in order.
        waits: what made the host wait for the GPU.
    """

    def __init__(self):
        self.graphs: list[Graph] = []
        self.waits: list[str] = []
        self.recorder: Recorder | None = None  # of the graph that is being captured

    def wait(self, what: str) -> None:
        """Of the host for the GPU, which a capture does not allow."""
        self.waits.append(what)
        self.forbid_in_capture(what)

    def forbid_in_capture(self, what: str) -> None:
        if self.recorder is not None:
            self.recorder.invalid = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def compute(self, function, *args, **kwargs):
        """Call a function with tensors of the CPU; a capture records its operators."""
        with self.recorder or contextlib.nullcontext():
            return function(*args, **kwargs)


the_gpu = SimulatedGPU()


class Held:
    """What a tensor on the GPU wraps; there is one for each, since `Module.to` allows no weak reference to a tensor."""

    all: ClassVar["weakref.WeakSet[Held]"] = weakref.WeakSet()

    def __init__(self, inner: torch.Tensor):
        self.inner = inner
        self.all.add(self)


class Recorder(TorchDispatchMode):
    """Records the operators of a capture.

    Attributes:
        calls: operators, arguments and outputs.
        read: the memory from before the capture that they read or write.
        invalid: whether an operation was refused.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.read: set[int] = set()
        self.invalid = False
        self._made: set[int] = set()

    def note_inputs(self, tensors: Iterable[torch.Tensor]) -> None:
        """The tensors of the CPU behind an operator's arguments on the GPU."""
        self.read |= {_memory_of(x) for x in tensors} - self._made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if any(isinstance(x, torch._C.Generator) for x in (*args, *kwargs.values())):
            # allowed since PyTorch registers generators at their first use
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        found = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, found))
        self._made |= {_memory_of(x) for x in _tensors_of(found)} - self.read
        return found


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`.

    Attributes:
        replays: how often it was replayed.
    """

    def __init__(self):
        self.calls: list[tuple] = []
        self.read: set[int] = set()
        self.replays = 0

    def pool(self) -> tuple:
        return ()

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again.

        Raises:
            RuntimeError: if memory that they read was freed since the capture.
        """
        if not self.read <= _memory_in_use():
            raise RuntimeError("the graph reads memory that was freed after its capture")
        self.replays += 1
        for function, args, kwargs, outputs in self.calls:
            schema = function._schema
            if any(a.alias_info and not a.alias_info.is_write for a in schema.arguments):
                continue  # a view shares the memory that is computed anew
            again = function(*args, **kwargs)
            one = len(schema.returns) == 1
            befores, nows = ((x,) if one else x or () for x in (outputs, again))
            for returned, before, now in zip(schema.returns, befores, nows, strict=True):
                if returned.alias_info is None:  # what is computed in place is in its memory already
                    for old, new in zip(_tensors_of(before), _tensors_of(now), strict=True):
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, pool=None, stream=None, capture_error_mode: str = "global") -> Iterator[None]:
    """Stands in for `torch.cuda.graph`; a capture with an invalid operation ends with an error of its own."""
    the_gpu.wait("torch.cuda.synchronize")  # with which torch.cuda.graph begins
    the_gpu.recorder = recorder = Recorder()
    try:
        yield
    finally:
        the_gpu.recorder = None
        if recorder.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    graph.calls, graph.read = recorder.calls, recorder.read
    the_gpu.graphs.append(graph)


def _tensors_of(value) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def _memory_of(inner: torch.Tensor) -> int:
    """The identity of a tensor's memory, as long as anything refers to it."""
    return inner.untyped_storage()._cdata


def _memory_in_use() -> set[int]:
    return {_memory_of(held.inner) for held in Held.all}
