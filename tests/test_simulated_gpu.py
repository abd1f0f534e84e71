"""The simulated GPU that other tests use: what it refuses, and what a replay repeats."""

import random

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.models.mixed_precision import free_memory
from tests.helpers.simulated_gpu import GPU, MEMORY, simulated_gpu
from tests.helpers.simulated_graphs import Graph, capture


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with simulated_gpu(monkeypatch) as found:
        yield found


def captured(function):
    graph = Graph()
    with capture(graph):
        found = function()
    return graph, found


def test_tensors_name_the_gpu_wherever_they_come_from():
    here = torch.rand(2, 3)
    made = [
        here.to("cuda"), here.cuda(), here.to(torch.ones(1, device="cuda")), torch.zeros(2, device=GPU),
        torch.tensor([1.0], device="cuda"), torch.as_tensor([2], device="cuda"), torch.arange(3, device="cuda"),
    ]  # fmt: skip
    for x in made:
        for y in (x, x + 1, x[:1], torch.ones_like(x), x.new_empty(2), x.float().to(torch.float64), x.sum()):
            assert y.device == GPU and y.is_cuda and not y.is_cpu
        assert x.cpu().device.type == "cpu"
    assert free_memory(GPU) == MEMORY and torch.Generator("cuda").device.type == "cuda"
    torch.testing.assert_close(made[0].cpu(), here)


def test_networks_are_moved_and_trained_in_place():
    torch.manual_seed(0)
    here, there = torch.nn.Conv3d(2, 3, 3), torch.nn.Conv3d(2, 3, 3)
    there.load_state_dict(here.state_dict())
    parameters = list(there.parameters())
    there.to("cuda", memory_format=torch.channels_last_3d)
    assert all(a is b for a, b in zip(parameters, there.parameters(), strict=True))
    x = torch.rand(1, 2, 4, 5, 6)
    for network, batch in ((here, x), (there, x.to("cuda"))):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        network(batch).square().sum().backward()
        optimizer.step()
    assert there.weight.grad.device == GPU
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.detach().cpu(), a.detach())


def test_operators_refuse_tensors_of_both_devices():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.nn.Linear(3, 2)(x)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.stack([x[0], torch.tensor(1.0)])
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # numbers of the host are allowed
    assert float(x.sum()) == 3


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.copy_(torch.tensor(2.0)),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.linalg.matrix_exp(x.diag()),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: torch.ones(3).to("cuda"),
        lambda x: 1 if (x > 0).all() else 2,
    ],
)
def test_reads_and_copies_wait_and_a_capture_refuses_them(reading, gpu):
    x = torch.tensor([1.0, 2.0, 3.0]).to("cuda")
    before = len(gpu.waits)
    reading(x)
    assert len(gpu.waits) == before + 1
    with pytest.raises(RuntimeError, match="failed due to a previous error during capture") as error:
        captured(lambda: reading(x))
    assert "not permitted when stream is capturing" in str(error.value.__context__)


def test_copies_in_the_background_do_not_wait(gpu):
    x = torch.ones(3).to("cuda", non_blocking=True)
    x.copy_(torch.zeros(3), non_blocking=True)
    x.to("cpu", non_blocking=True)
    x[x > 0] = 5.0
    assert x.sum().device == GPU and not gpu.waits
    with pytest.raises(RuntimeError):
        captured(lambda: x.to("cpu", non_blocking=True))


def test_a_replay_computes_anew_from_the_memory_of_the_capture():
    x = torch.tensor([1.0, 2.0, 3.0]).to("cuda")
    counter = torch.zeros(3, device="cuda")

    def step():
        filled = torch.zeros(3, device="cuda")
        filled[x > 1.5] = 7.0
        filled.view(3, 1)[:, 0].add_(x)
        counter.add_(1)
        return filled * 2, x[1:]

    graph, (doubled, view) = captured(step)
    assert doubled.tolist() == [2, 18, 20]
    for values in ([2.0, 0.0, 1.0], [5.0, 6.0, 7.0]):
        x.copy_(torch.tensor(values))
        graph.replay()
        expected = [2 * (v + (7 if v > 1.5 else 0)) for v in values]
        assert doubled.tolist() == expected and view.tolist() == values[1:]
    assert counter.tolist() == [3, 3, 3] and graph.replays == 2


def test_a_replay_repeats_what_python_computed():
    x = torch.ones(2, device="cuda")
    host = torch.tensor(3.0)
    graph, found = captured(lambda: x * random.random() + host)
    before = found.tolist()
    host.fill_(5.0)
    graph.replay()
    assert found.tolist() == before


def test_a_replay_draws_new_numbers_from_the_default_generator_only():
    graph, found = captured(lambda: torch.rand(3, device="cuda"))
    values = []
    for _ in range(3):
        values.append(found.tolist())
        graph.replay()
    assert values[0] != values[1] != values[2]
    generator = torch.Generator("cuda")
    with pytest.raises(RuntimeError, match="not in capture mode"):
        captured(lambda: torch.rand(3, device="cuda", generator=generator))


def test_a_replay_computes_what_an_operator_returns_beside_what_it_changes():
    x = torch.tensor([-4.0, 2.0]).to("cuda")
    graph, found = captured(lambda: F.rrelu(x, 0.25, 0.25, training=True))
    assert found.tolist() == [-1, 2]
    x.copy_(torch.tensor([3.0, -8.0]))
    graph.replay()
    assert found.tolist() == [3, -2]


def test_a_replay_refuses_memory_that_was_freed():
    x, held = torch.ones(3, device="cuda"), [torch.full((3,), 2.0, device="cuda")]
    graph, found = captured(lambda: (x + held[0][:2].sum()) * torch.tensor(2.0))
    graph.replay()
    assert found.tolist() == [10, 10, 10]
    view = held[0][1:]  # keeps the memory
    held[0] = torch.full((3,), 2.0, device="cuda")
    graph.replay()
    del view
    with pytest.raises(RuntimeError, match="reads memory that was freed"):
        graph.replay()


def test_other_errors_end_a_capture_as_they_are(gpu):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        captured(full)

    def caught():
        x = torch.ones(2, device="cuda")
        try:
            float(x.sum())
        except RuntimeError:
            return x * 2

    with pytest.raises(RuntimeError, match="failed due to a previous error during capture"):
        captured(caught)
    assert not gpu.graphs


def test_gradients_are_captured_with_the_loss():
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0], device="cuda"))
    x = torch.tensor([1.0, 1.0]).to("cuda")

    def step():
        weight.grad = None
        loss = (weight * x).square().sum()
        loss.backward()
        return loss.detach()

    graph, loss = captured(step)
    x.copy_(torch.tensor([2.0, 0.5]))
    graph.replay()
    assert float(loss) == 16 + 2.25
    assert weight.grad.tolist() == [2 * 4 * 2, 2 * 1.5 * 0.5]


def test_autocast_of_the_gpu_is_on_within_its_block_only():
    a, b = torch.ones(2, 3, device="cuda"), torch.ones(3, 2, device="cuda")
    assert not torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        assert (a @ b).dtype == torch.bfloat16
    assert (a @ b).dtype == torch.float32
