"""Forward passes of a network replayed as CUDA graphs."""

from collections import OrderedDict

import torch
from torch import nn

from diffdiscover3d.models.mixed_precision import autocast_dtype


class GraphedCalls:
    """Calls a network; calls that are like an earlier one are captured as a CUDA graph and then replayed.

    Two calls are alike if shapes and types of the tensors, the other arguments, the autocast type and the network's
    weights are the same. The first is run as it is, the second captured. Calls that record gradients, and those on
    other devices, are never captured.

    Args:
        limit: number of graphs kept; each keeps the memory of a forward pass.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._graphs: OrderedDict[tuple, tuple | None] = OrderedDict()

    def __call__(self, network: nn.Module, *tensors: torch.Tensor, **options):
        """The output of `network(*tensors, **options)`, a mapping of tensors and other values.

        Args:
            tensors: on the network's device.
            options: hashable values.
        """
        if tensors[0].device.type != "cuda" or torch.is_grad_enabled():
            return network(*tensors, **options)
        shapes = tuple((t.shape, t.dtype, t.device) for t in tensors)
        weights = tuple((p.data_ptr(), p.dtype) for p in network.parameters())
        key = shapes, tuple(options.items()), autocast_dtype(tensors[0].device), weights, network.training
        if key not in self._graphs:
            self._graphs[key] = None
            while len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
            return network(*tensors, **options)
        self._graphs.move_to_end(key)
        if self._graphs[key] is None:
            self._graphs[key] = self._capture(network, tensors, options)
        graph, inputs, output = self._graphs[key]
        for place, given in zip(inputs, tensors, strict=True):
            place.copy_(given)
        graph.replay()
        return type(output)(**{name: _copied(value) for name, value in output.items()})

    @staticmethod
    def _capture(network: nn.Module, tensors: tuple, options: dict) -> tuple:
        inputs = [t.clone() for t in tensors]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = network(*inputs, **options)
        return graph, inputs, output


def _copied(value):
    """A copy of a tensor, or of the tensors of a tuple; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
