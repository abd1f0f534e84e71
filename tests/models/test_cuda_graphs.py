"""Calls replayed as CUDA graphs, on a simulated GPU."""

import pytest
import torch

from diffdiscover3d.models.cuda_graphs import GraphedCalls
from diffdiscover3d.models.unet_3d import UNet3DModel, UNet3DOutput
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from tests.helpers.simulated_gpu import simulated_gpu
from tests.helpers.tiny_trainings import TINY


@pytest.fixture
def gpu(monkeypatch):
    with simulated_gpu(monkeypatch) as found:
        yield found


class Network(torch.nn.Module):
    """A feature for each stage: the volume times weight and stage."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, stages=(1,)):
        return UNet3DOutput(sample=None, features=tuple(self.weight * s * x for s in stages), extent=(1, 2, 3))


def network_on_gpu():
    return Network().to("cuda")


def values(seed, side=2):
    return torch.rand(side, 3, generator=torch.Generator().manual_seed(seed))


def volume(seed, side=2):
    return values(seed, side).to("cuda")


def assert_features(found, seed, side=2, stages=(1,), weight=2):
    for s, feature in zip(stages, found.features, strict=True):
        torch.testing.assert_close(feature.cpu(), weight * s * values(seed, side))


@torch.no_grad()
def test_the_second_call_of_a_kind_is_captured_and_later_ones_replayed(gpu):
    network, calls = network_on_gpu(), GraphedCalls(limit=2)
    kept = []
    for seed in range(4):
        for stages in ((1,), (1, 3)):
            found = calls(network, volume(seed), stages=stages)
            assert_features(found, seed, stages=stages)
            assert found.sample is None and found.extent == (1, 2, 3)
            kept.append((seed, found))
    assert [graph.replays for graph in gpu.graphs] == [3, 3]
    for seed, found in kept:  # outputs are copies of the graph's memory
        torch.testing.assert_close(found.features[0].cpu(), 2 * values(seed))
    network.weight.mul_(2)
    assert_features(calls(network, volume(0), stages=(1,)), 0, weight=4)
    assert gpu.graphs[0].replays == 4

    for seed in range(2):  # a third kind: the oldest graph is dropped
        calls(network, volume(seed, side=5))
    assert len(gpu.graphs) == 3 and len(calls._graphs) == 2
    network.weight.data = torch.tensor(3.0, device="cuda")  # other memory: the old graphs do not fit
    for seed in range(3):
        assert_features(calls(network, volume(seed), stages=(1,)), seed, weight=3)
    assert len(gpu.graphs) == 4


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True])
def test_graphed_features_are_the_eager_ones(gpu, bf16):
    torch.manual_seed(0)
    eager = DiffusionFeaturePipeline(UNet3DModel(**TINY), make_scheduler(250)).to("cuda")
    graphed = DiffusionFeaturePipeline(eager.unet, eager.scheduler)
    graphed.enable_cuda_graphs()
    for seed in range(3):
        x = torch.rand(16, 24, 8, generator=torch.Generator().manual_seed(seed))
        for options in ({"stages": (1, 2)}, {"stages": (2,), "denoised": True}):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                found, expected = (
                    pipe(x, generator=torch.Generator().manual_seed(seed), **options) for pipe in (graphed, eager)
                )
            torch.testing.assert_close(found.features, expected.features)
    assert [graph.replays for graph in gpu.graphs] == [2, 2]


class Reading(Network):
    """A network whose host reads a value."""

    def forward(self, x, stages=(1,)):
        return super().forward(x, stages) if float(x.sum()) >= 0 else None


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again(gpu, monkeypatch, caplog):
    tried, streams = [], []
    capture = GraphedCalls._capture
    monkeypatch.setattr(GraphedCalls, "_capture", lambda *given: tried.append(given[3]) or capture(*given))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "the caller's")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    network, calls = Reading().to("cuda"), GraphedCalls()
    for seed in range(4):
        assert_features(calls(network, volume(seed)), seed)
    assert len(tried) == 1 and streams == ["the caller's"] and not gpu.graphs
    (record,) = caplog.records
    assert record.message.startswith(
        "a forward pass cannot be captured as a CUDA graph: CUDA error: operation not permitted when stream is capt"
    )


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
def test_graphs_are_dropped_where_their_memory_is_needed(gpu, monkeypatch):
    network, calls = Full().to("cuda"), GraphedCalls()
    for _ in range(2):
        calls(network, volume(0))
    monkeypatch.setattr(Full, "graphs", staticmethod(lambda: calls._graphs))
    assert len(calls._graphs) == 1
    assert_features(calls(network, volume(1, side=5)), 1, side=5)
    assert len(gpu.graphs) == 1 and not calls._graphs
    for _ in range(2):
        calls(network, volume(0))
    monkeypatch.setattr(GraphedCalls, "_replay", Full.fail)  # the copies of a replay find no memory
    assert_features(calls(network, volume(3)), 3)
    assert not calls._graphs
    monkeypatch.setattr(Full, "graphs", staticmethod(lambda: True))
    with pytest.raises(torch.OutOfMemoryError):  # there is no graph to drop
        calls(network, volume(2, side=7))


@torch.no_grad()
def test_kinds_whose_graphs_do_not_fit_together_are_not_captured_for_ever(gpu, monkeypatch, caplog):
    def capture(self, network, tensors, options, original=GraphedCalls._capture):
        tried.append(len(tensors[0]))
        if self._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, network, tensors, options)

    tried = []
    monkeypatch.setattr(GraphedCalls, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    network, calls = network_on_gpu(), GraphedCalls()
    for seed in range(6):
        for side in (2, 5):
            assert_features(calls(network, volume(seed, side=side)), seed, side=side)
    # each gave way to the other once; then one keeps its graph
    assert tried == [2, 5, 2, 5] and [key[0][0][0][0] for key in calls._graphs] == [2]
    assert len(caplog.records) == 2


@torch.no_grad()
def test_a_network_elsewhere_is_not_captured(gpu):
    """Its weights are brought to the GPU for each call."""
    network, calls = Network(), GraphedCalls()
    for seed in range(3):
        calls(network, volume(seed))
    assert not gpu.graphs and not calls._seen


def test_calls_with_gradients_are_not_captured(gpu):
    network, calls = network_on_gpu(), GraphedCalls()
    for seed in range(3):
        assert calls(network, volume(seed)).features[0].requires_grad
    assert not gpu.graphs


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
