"""Forward and backward passes replayed as CUDA graphs, on a simulated GPU."""

import weakref

import pytest
import torch

from diffdiscover3d.training import backward
from diffdiscover3d.training.backward import EagerPass, GraphedPass, make_pass
from diffdiscover3d.training.config import DiffusionConfig
from tests.helpers.simulated_gpu import simulated_gpu


@pytest.fixture
def gpu(monkeypatch):
    with simulated_gpu(monkeypatch) as found:
        yield found


def make(cls=EagerPass):
    """A pass of a small network, and its parameters."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2).to("cuda")
    parameters = list(network.parameters())

    def losses(batch):
        distance = (network(batch["x"]) - batch["y"]).square().mean()
        return {"loss": distance + batch["shape"][0] * network.weight.abs().sum(), "distance": distance}

    def zero_grad():
        for p in parameters:
            p.grad = None

    if cls is EagerPass:
        return EagerPass(losses, lambda loss: loss.backward()), parameters, zero_grad
    graphed = GraphedPass(losses, lambda loss: loss.backward(), parameters, zero_grad, torch.device("cuda"))
    return graphed, parameters, zero_grad


def batch_of(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(size, 3, generator=generator).to("cuda"),
        "y": torch.randn(size, 2, generator=generator).to("cuda"),
        "shape": (1,),
    }


def test_replays_give_the_losses_and_gradients_of_eager_passes(gpu):
    graphed, parameters, zero_grad = make(GraphedPass)
    eager, expected_parameters, expected_zero_grad = make()
    sizes = [4, 4, 4, 4, 4, 2, 4]  # the sixth batch does not fit the graph
    for step, size in enumerate(sizes):
        batch = batch_of(step, size)
        found, expected = graphed(batch), eager(batch)
        for name in expected:
            torch.testing.assert_close(found[name].detach(), expected[name].detach())
        for a, b in zip(parameters, expected_parameters, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            with torch.no_grad():  # clipping and the optimiser change both in place
                a.grad.mul_(0.1)
                a.sub_(a.grad)
                b.sub_(0.1 * b.grad)
        if graphed.resets_gradients:
            zero_grad()
        expected_zero_grad()
    assert [graph.replays for graph in gpu.graphs] == [3]


def test_a_step_that_cannot_be_captured_runs_eagerly(gpu, monkeypatch, caplog):
    graphed, parameters, zero_grad = make(GraphedPass)
    alive, emptied = [], []  # losses of the capture when memory is given back, which needs them to be gone

    def losses(batch, original=graphed._losses):
        found = original(batch)
        alive.append(weakref.ref(found["distance"]))
        return found if float(found["loss"]) >= 0 else {}  # the host reads a value

    graphed._losses = losses
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(sum(ref() is not None for ref in alive)))
    for step in range(6):
        graphed(batch_of(step))
        eager, expected, _ = make()
        eager(batch_of(step))
        torch.testing.assert_close(parameters[0].grad, expected[0].grad)
        assert graphed.resets_gradients
        zero_grad()
    assert [r.message for r in caplog.records if "not permitted" in r.message] and not gpu.graphs
    assert len([r for r in caplog.records if "cannot be captured" in r.message]) == 1
    assert len(emptied) == 2 and emptied[1] == 0


@pytest.mark.parametrize(
    ("options", "reason"), [({}, "no CUDA GPU"), ({"gradient_accumulation_steps": 2}, "accumulated")]
)
def test_graphs_are_refused_where_they_cannot_work(options, reason, caplog):
    class Accelerator:
        device, num_processes, scaler = torch.device("cpu"), 1, None

        def backward(self, loss):
            loss.backward()

    config = DiffusionConfig(cuda_graphs=True, **options)
    made = make_pass(lambda batch: {}, [], lambda: None, config, Accelerator())
    assert type(made) is EagerPass
    assert reason in caplog.text
    caplog.clear()
    made = make_pass(lambda batch: {}, [], lambda: None, DiffusionConfig(**options), Accelerator())
    assert type(made) is EagerPass
    assert not caplog.records  # nothing was asked for
    assert backward._WARMUP == 3


@pytest.mark.parametrize(
    ("wanted", "suits", "one_shape", "graphed"),
    [
        (None, True, True, True),
        (None, False, True, False),
        (None, True, False, False),
        (False, True, True, False),
        (True, False, True, True),
        (True, True, False, False),
    ],
)
def test_graphs_are_the_default_where_they_suit(gpu, wanted, suits, one_shape, graphed, caplog):
    class Accelerator:
        device, num_processes, scaler, backward = torch.device("cuda"), 1, None, None

    made = make_pass(None, [], None, DiffusionConfig(cuda_graphs=wanted), Accelerator(), suits, one_shape)
    assert isinstance(made, GraphedPass) == graphed
    assert bool(caplog.records) == bool(wanted and not graphed)
