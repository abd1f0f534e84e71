"""Calls replayed as graphs, on a stand-in for CUDA graphs that computes a captured call again."""

import copy
from dataclasses import dataclass

import pytest
import torch

from diffdiscover3d.models import cuda_graphs
from diffdiscover3d.models.cuda_graphs import GraphedCalls
from diffdiscover3d.models.unet_3d import UNet3DModel, UNet3DOutput
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler


@dataclass(frozen=True)
class Place:
    """A tensor's device as a GPU."""

    type: str = "cuda"


class OnGPU(torch.Tensor):
    """A tensor of the host that names a GPU as its device."""

    device = Place()


@pytest.fixture
def captured(monkeypatch):
    """The calls that were captured."""
    calls = []

    class Graph:
        def replay(self):  # with the weights of the capture, as a graph reads them from where they were
            network, inputs, options, output = self.call
            again = network(*inputs, **options)
            for old, new in zip(output.features, again.features, strict=True):
                old.copy_(new)

    def capture(self, network, tensors, options):
        graph, inputs = Graph(), [t.clone() for t in tensors]
        output = network(*inputs, **options)
        graph.call = copy.deepcopy(network), inputs, options, output
        calls.append(options)
        return graph, inputs, output

    monkeypatch.setattr(GraphedCalls, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(cuda_graphs, "autocast_dtype", lambda device: None)
    return calls


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def parameters(self, recurse=True):
        return (p.as_subclass(OnGPU) for p in super().parameters(recurse))

    def forward(self, x, stages=(1,)):
        return UNet3DOutput(sample=None, features=tuple(self.weight * s * x for s in stages), extent=(1, 2, 3))


def volume(seed, side=2):
    return torch.rand(side, 3, generator=torch.Generator().manual_seed(seed)).as_subclass(OnGPU)


@torch.no_grad()
def test_the_second_call_of_a_kind_is_captured_and_later_ones_replayed(captured):
    network, calls = Network(), GraphedCalls(limit=2)
    kept = []
    for seed in range(4):
        for stages in ((1,), (1, 3)):
            found = calls(network, volume(seed), stages=stages)
            for s, feature in zip(stages, found.features, strict=True):
                torch.testing.assert_close(torch.Tensor(feature), 2 * s * torch.Tensor(volume(seed)))
            assert found.sample is None and found.extent == (1, 2, 3)
            kept.append((seed, found.features[0]))
    assert captured == [{"stages": (1,)}, {"stages": (1, 3)}]
    for seed, feature in kept:  # outputs are copies of the graph's memory
        torch.testing.assert_close(torch.Tensor(feature), 2 * torch.Tensor(volume(seed)))

    for seed in range(2):  # a third kind: the oldest graph is dropped
        calls(network, volume(seed, side=5))
    assert len(captured) == 3 and len(calls._graphs) == 2
    network.weight.data = torch.tensor(3.0)  # other memory: the old graphs do not fit
    for seed in range(3):
        found = calls(network, volume(seed), stages=(1,))
        torch.testing.assert_close(torch.Tensor(found.features[0]), 3 * torch.Tensor(volume(seed)))


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again(monkeypatch, captured, caplog):
    def fail(self, network, tensors, options):
        tried.append(options)
        try:
            raise RuntimeError("operation not permitted\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    tried, streams = [], []
    monkeypatch.setattr(GraphedCalls, "_capture", fail)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    network, calls = Network(), GraphedCalls()
    for seed in range(4):
        found = calls(network, volume(seed)).features[0]
        torch.testing.assert_close(torch.Tensor(found), 2 * torch.Tensor(volume(seed)))
    assert len(tried) == 1 and streams == ["the caller's"]
    message = "a forward pass cannot be captured as a CUDA graph: operation not permitted"
    assert [r.message for r in caplog.records] == [message]


class Full(Network):
    """A network for whose calls there is no memory while a graph is kept."""

    graphs = staticmethod(lambda: ())

    @staticmethod
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, x, stages=(1,)):
        if len(x) > 2 and self.graphs():
            self.fail()
        return super().forward(x, stages)


@torch.no_grad()
def test_graphs_are_dropped_where_their_memory_is_needed(captured, monkeypatch):
    network, calls = Full(), GraphedCalls()
    for _ in range(2):
        calls(network, volume(0))
    monkeypatch.setattr(Full, "graphs", staticmethod(lambda: calls._graphs))
    assert len(calls._graphs) == 1
    found = calls(network, volume(1, side=5)).features[0]
    torch.testing.assert_close(torch.Tensor(found), 2 * torch.Tensor(volume(1, side=5)))
    assert len(captured) == 1 and not calls._graphs
    for _ in range(2):
        calls(network, volume(0))
    monkeypatch.setattr(GraphedCalls, "_replay", Full.fail)  # the copies of a replay find no memory
    found = calls(network, volume(3)).features[0]
    torch.testing.assert_close(torch.Tensor(found), 2 * torch.Tensor(volume(3)))
    assert not calls._graphs
    monkeypatch.setattr(Full, "graphs", staticmethod(lambda: True))
    with pytest.raises(torch.OutOfMemoryError):  # there is no graph to drop
        calls(network, volume(2, side=7))


@torch.no_grad()
def test_kinds_whose_graphs_do_not_fit_together_are_not_captured_for_ever(captured, monkeypatch, caplog):
    def capture(self, network, tensors, options, original=GraphedCalls._capture):
        tried.append(len(tensors[0]))
        if self._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, network, tensors, options)

    tried = []
    monkeypatch.setattr(GraphedCalls, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    network, calls = Network(), GraphedCalls()
    for seed in range(6):
        for side in (2, 5):
            found = calls(network, volume(seed, side=side)).features[0]
            torch.testing.assert_close(torch.Tensor(found), 2 * torch.Tensor(volume(seed, side=side)))
    # each gave way to the other once; then one keeps its graph
    assert tried == [2, 5, 2, 5] and [key[0][0][0][0] for key in calls._graphs] == [2]
    assert len(caplog.records) == 2


@torch.no_grad()
def test_a_network_elsewhere_is_not_captured(captured):
    """Its weights are brought to the GPU for each call."""
    network, calls = Network(), GraphedCalls()
    network.parameters = lambda: iter([network.weight])
    for seed in range(3):
        calls(network, volume(seed))
    assert not captured and not calls._seen


def test_calls_with_gradients_are_not_captured(captured):
    network, calls = Network(), GraphedCalls()
    for seed in range(3):
        assert calls(network, volume(seed)).features[0].requires_grad
    assert not captured


def test_a_cpu_ignores_graphs():
    torch.manual_seed(0)
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
    pipe = DiffusionFeaturePipeline(unet, make_scheduler(250))

    def features():
        return pipe(torch.ones(6, 4, 8).cumsum(2), generator=torch.Generator().manual_seed(0), stages=(1,)).features[0]

    expected = features()
    pipe.enable_cuda_graphs()
    for _ in range(3):
        torch.testing.assert_close(features(), expected, rtol=0, atol=0)
    assert not pipe._graphs._graphs
    pipe.disable_cuda_graphs()
    torch.testing.assert_close(features(), expected, rtol=0, atol=0)
