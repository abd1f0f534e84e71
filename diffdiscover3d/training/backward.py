"""Forward and backward pass of a training step: run operator by operator, or replayed as a CUDA graph."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffdiscover3d.errors import first_line
from diffdiscover3d.models.cuda_graphs import cause_of, release_memory
from diffdiscover3d.training.config import TrainingConfig

logger = logging.getLogger("diffdiscover3d")
Losses = dict[str, torch.Tensor]
_WARMUP = 3  # steps before a graph is captured: libraries choose their kernels in them


class EagerPass:
    """Computes losses and gradients.

    Args:
        losses: called with a batch, returns scalar losses; the one called "loss" is differentiated.
        backward: called with that loss.
    """

    resets_gradients = True  # whether the loop should set gradients to `None` after each step

    def __init__(self, losses: Callable[[dict], Losses], backward: Callable[[torch.Tensor], None]):
        self._losses, self._backward = losses, backward

    def __call__(self, batch: dict) -> Losses:
        losses = self._losses(batch)
        self._backward(losses["loss"])
        return losses


class GraphedPass(EagerPass):
    """The same, captured as a CUDA graph after a few steps, and replayed from then on.

    The host then launches one graph instead of thousands of kernels. The pass must depend on nothing but the tensors of
    the batch, in shapes that do not change, and on parameters that stay where they are. A batch of another shape, and
    every batch if capturing fails, is computed by the eager pass. Gradients are overwritten by each replay.

    Args:
        parameters: what is trained.
        begin: undoes what an earlier pass of the same step has left, such as gradients.
        device: the GPU.
    """

    def __init__(
        self,
        losses: Callable[[dict], Losses],
        backward: Callable[[torch.Tensor], None],
        parameters: list[torch.nn.Parameter],
        begin: Callable[[], None],
        device: torch.device,
    ):
        super().__init__(losses, backward)
        self._parameters, self._begin = parameters, begin
        self._steps, self._failed = 0, False
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def resets_gradients(self) -> bool:
        return self._graph is None

    def __call__(self, batch: dict) -> Losses:
        leaves, layout = tree_flatten(batch)
        if self._graph is not None and self._is_captured_for(leaves, layout):
            return self._replay(leaves)
        if self._graph is not None:  # an eager pass adds to gradients
            for parameter in self._parameters:
                parameter.grad = None
            losses = super().__call__(batch)
            self._keep_gradients()
            return losses
        if self._failed:
            return super().__call__(batch)
        self._steps += 1
        if self._steps <= _WARMUP:
            return self._on_stream(super().__call__, batch)
        if self._try_to_capture(leaves, layout):
            return self._replay(leaves)
        self._begin()  # the frames of the capture, and their memory, are gone by now
        release_memory()
        return super().__call__(batch)

    def _try_to_capture(self, leaves: list, layout) -> bool:
        stream = torch.cuda.current_stream(self._device)
        try:
            self._capture(leaves, layout)
            return True
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own
            self._failed, self._static, self._captured = True, [], {}
            reason = first_line(cause_of(error))
            logger.warning("the step cannot be captured as a CUDA graph (%s); it runs eagerly", reason)
            return False

    def _on_stream(self, function, batch: dict) -> Losses:
        """Run on the stream that captures later, since gradients stay with the stream that made them first."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = function(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        for tensor in [*losses.values(), *(p.grad for p in self._parameters if p.grad is not None)]:
            tensor.record_stream(torch.cuda.current_stream())
        return losses

    def _capture(self, leaves: list, layout) -> None:
        self._begin()
        torch.cuda.empty_cache()  # a graph has memory of its own and cannot use what eager steps have cached
        self._layout = layout
        self._static = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # the thread that loads the next batch may allocate pinned memory in the meantime
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            losses = self._losses(tree_unflatten(self._static, layout))
            self._backward(losses["loss"])
            self._captured = {name: value.detach() for name, value in losses.items()}
        self._gradients = [p.grad for p in self._parameters]
        self._graph = graph

    def _replay(self, leaves: list) -> Losses:
        given = [(a, b) for a, b in zip(self._static, leaves, strict=True) if isinstance(a, torch.Tensor)]
        torch._foreach_copy_([a for a, _ in given], [b for _, b in given], non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in self._captured.items()}

    def _keep_gradients(self) -> None:
        """Copy gradients of an eager pass into the graph's, which stay in place."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.copy_(parameter.grad) if parameter.grad is not None else gradient.zero_()

    def _is_captured_for(self, leaves: list, layout) -> bool:
        return layout == self._layout and all(
            a.shape == b.shape and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(self._static, leaves, strict=True)
        )


def make_pass(
    losses: Callable[[dict], Losses],
    parameters: list[torch.nn.Parameter],
    begin: Callable[[], None],
    config: TrainingConfig,
    accelerator: Accelerator,
    suits_graphs: bool = True,
    has_one_shape: bool = True,
) -> EagerPass:
    """The forward and backward pass of a training.

    Args:
        losses, parameters, begin: of [`GraphedPass`].
        suits_graphs: whether a CUDA graph is used where it is possible and `config` leaves the choice open.
        has_one_shape: whether all batches have the same shapes.
    """
    if config.cuda_graphs is False or (config.cuda_graphs is None and not suits_graphs):
        return EagerPass(losses, accelerator.backward)
    obstacles = {
        "the device is no CUDA GPU": accelerator.device.type != "cuda",
        "volumes differ in shape": not has_one_shape,
        "there are several processes": accelerator.num_processes > 1,
        "float16 scales its loss on the host": accelerator.scaler is not None,
        "gradients are accumulated": config.gradient_accumulation_steps > 1,
        "activations are recomputed": getattr(config, "gradient_checkpointing", False),
    }
    found = [reason for reason, holds in obstacles.items() if holds]
    if found and config.cuda_graphs is None:
        return EagerPass(losses, accelerator.backward)
    if found:
        logger.warning("--cuda-graphs is ignored: %s", "; ".join(found))
        return EagerPass(losses, accelerator.backward)
    return GraphedPass(losses, accelerator.backward, parameters, begin, accelerator.device)
