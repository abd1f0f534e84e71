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
    gradients, and those on other devices, are never captured. If a capture fails, calls like it are run as they are.

    Args:
        limit: number of graphs kept; each keeps the memory of a forward pass.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._seen: set[tuple] = set()
        self._failed: set[tuple] = set()
        self._graphs: OrderedDict[tuple, tuple] = OrderedDict()

    def __call__(self, network: nn.Module, *tensors: torch.Tensor, **options):
        """The output of `network(*tensors, **options)`, a dataclass of tensors and other values.

        Args:
            tensors: on the network's device.
            options: hashable values.
        """
        if tensors[0].device.type != "cuda" or torch.is_grad_enabled():
            return network(*tensors, **options)
        key = _key(network, tensors, options)
        if key not in self._seen or key in self._failed:
            self._seen.add(key)
            return network(*tensors, **options)
        if key not in self._graphs:
            stream = torch.cuda.current_stream()
            try:
                self._graphs[key] = self._capture(network, tensors, options)
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a failed capture leaves its own
                self._failed.add(key)
                logger.warning("a forward pass cannot be captured as a CUDA graph: %s", first_line(error))
                return network(*tensors, **options)
            while len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, inputs, output = self._graphs[key]
        for place, given in zip(inputs, tensors, strict=True):
            place.copy_(given)
        graph.replay()
        return type(output)(**{f.name: _copied(getattr(output, f.name)) for f in dataclasses.fields(output)})

    @staticmethod
    def _capture(network: nn.Module, tensors: tuple, options: dict) -> tuple:
        inputs = [t.clone() for t in tensors]
        graph = torch.cuda.CUDAGraph()
        dtype, uncached = autocast_dtype(tensors[0].device), contextlib.nullcontext()
        if dtype is not None:  # autocast's copies of weights live as long as its context, a graph lives longer
            uncached = torch.autocast(tensors[0].device.type, dtype, cache_enabled=False)
        with torch.cuda.graph(graph), uncached:
            output = network(*inputs, **options)
        return graph, inputs, output


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
