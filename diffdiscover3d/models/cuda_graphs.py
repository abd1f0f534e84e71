"""Forward passes of a network replayed as CUDA graphs."""

import contextlib
import dataclasses
import itertools
import logging
from collections import OrderedDict

import torch
from torch import nn

from diffdiscover3d.errors import first_line
from diffdiscover3d.models.mixed_precision import autocast_dtype

logger = logging.getLogger("diffdiscover3d")


class GraphedCalls:
    """Calls a network; calls that are like an earlier one are captured as a CUDA graph and then replayed.

    Two calls are alike if shapes and types of the tensors, the other arguments, the autocast type and the memory of the
    network's weights and buffers are the same. The first is run as it is, the second captured. Calls that record
    gradients, and those on other devices than the network's GPU, are never captured. If a capture fails, calls like it
    are run as they are. The graphs share their memory, since they are replayed one at a time and outputs are copied.

    Args:
        limit: number of graphs kept.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._seen: set[tuple] = set()
        self._short: set[tuple] = set()  # for whose graph there was no memory beside others
        self._failed: set[tuple] = set()
        self._graphs: OrderedDict[tuple, tuple] = OrderedDict()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, network: nn.Module, *tensors: torch.Tensor, **options):
        """The output of `network(*tensors, **options)`, a dataclass of tensors and other values.

        Args:
            tensors: on the network's device.
            options: hashable values.
        """
        place = tensors[0].device
        if place.type != "cuda" or torch.is_grad_enabled() or next(network.parameters()).device != place:
            return network(*tensors, **options)
        key = _key(network, tensors, options)
        is_new = key not in self._seen
        self._seen.add(key)
        if is_new or key in self._failed:
            return self._run(network, tensors, options)
        if key not in self._graphs and not self._try_to_capture(key, network, tensors, options):
            return self._run(network, tensors, options)  # the frames of the capture, and their memory, are gone by now
        try:
            return self._replay(key, tensors)
        except torch.OutOfMemoryError:  # of the copies
            pass
        self._drop_graphs()
        return network(*tensors, **options)

    def _replay(self, key: tuple, tensors: tuple):
        self._graphs.move_to_end(key)
        graph, inputs, output = self._graphs[key]
        for target, given in zip(inputs, tensors, strict=True):
            target.copy_(given)
        graph.replay()
        return type(output)(**{f.name: _copied(getattr(output, f.name)) for f in dataclasses.fields(output)})

    def _run(self, network: nn.Module, tensors: tuple, options: dict):
        """A call as it is; if there is no memory, again without the graphs."""
        try:
            return network(*tensors, **options)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self._drop_graphs()
        return network(*tensors, **options)

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        release_memory()

    def _try_to_capture(self, key: tuple, network: nn.Module, tensors: tuple, options: dict) -> bool:
        """Capture a call, after dropping the oldest graph beyond the limit; `False` if it cannot be captured."""
        stream = torch.cuda.current_stream(tensors[0].device)
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._capture(network, tensors, options)
            return True
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own
            lacks_memory = isinstance(cause_of(error), torch.OutOfMemoryError)
            logger.warning("a forward pass cannot be captured as a CUDA graph: %s", first_line(cause_of(error)))
        if lacks_memory and self._graphs and key not in self._short:  # without the others it may fit the next time
            self._short.add(key)
            self._drop_graphs()
        else:
            self._failed.add(key)
        return False

    def _capture(self, network: nn.Module, tensors: tuple, options: dict) -> tuple:
        place = tensors[0].device
        dtype, uncached = autocast_dtype(place), contextlib.nullcontext()
        if dtype is not None:  # autocast's copies of weights live as long as its context, a graph lives longer
            uncached = torch.autocast(place.type, dtype, cache_enabled=False)
        with torch.cuda.device(place):
            network(*tensors, **options)  # libraries choose their kernels, for each thread anew
            inputs = [t.clone() for t in tensors]
            stream = self._streams.setdefault(place, torch.cuda.Stream(place))
            # a graph has the address of a workspace of its stream; its memory is freed with the pool's last graph
            pool = next((g.pool() for g, (first, *_), _ in self._graphs.values() if first.device == place), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"), uncached:
                output = network(*inputs, **options)
        return graph, inputs, output


def release_memory() -> None:
    """Give back the memory that PyTorch has cached; torch before 2.13 cannot once a capture has failed."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def cause_of(error: RuntimeError) -> BaseException:
    """The error that ended a capture; the end itself reports only that there was one."""
    return error.__context__ or error


def _key(network: nn.Module, tensors: tuple[torch.Tensor, ...], options: dict) -> tuple:
    shapes = tuple((t.shape, t.dtype, t.device) for t in tensors)
    memory = tuple((t.data_ptr(), t.dtype) for t in itertools.chain(network.parameters(), network.buffers()))
    modes = autocast_dtype(tensors[0].device), torch.is_inference_mode_enabled(), network.training
    return shapes, tuple(options.items()), memory, modes


def _copied(value):
    """A copy of a tensor, or of the tensors of a tuple; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
