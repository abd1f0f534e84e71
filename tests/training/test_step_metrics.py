"""Deferred reading of step metrics, and steps without synchronisation."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub.registry import load_teacher
from diffdiscover3d.train import main
from diffdiscover3d.training.backward import EagerPass
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import _make_loader, _read_ahead, _take_step
from diffdiscover3d.training.step_metrics import MAX_BAD_STEPS, StepMetrics

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # only the type is used
NAN = float("nan")


def values(loss, finite=1.0, stop=0.0):
    return torch.tensor([loss, finite, stop])


def test_a_cpu_is_read_at_once_and_a_gpu_a_step_late(tmp_path):
    cpu, gpu = StepMetrics(CPU, tmp_path), StepMetrics(GPU, tmp_path)
    for step in (1, 2, 3):
        for metrics in (cpu, gpu):
            metrics.add(step, ("loss",), values(float(step)))
            metrics.catch_up()
        assert cpu.latest == {"loss": step} and gpu.latest == ({"loss": step - 1} if step > 1 else {})
    gpu.catch_up(everything=True)
    assert gpu.latest == {"loss": 3}


def test_steps_that_are_not_finite_are_counted_in_a_row(tmp_path):
    metrics = StepMetrics(CPU, tmp_path)
    for step, row in enumerate([values(NAN), values(1.0, finite=0.5), values(1.0), values(NAN)], start=1):
        metrics.add(step, ("loss",), row)
        metrics.catch_up()
        assert metrics.bad_steps == [1, 2, 0, 1][step - 1]
    for step in range(5, 4 + MAX_BAD_STEPS):
        metrics.add(step, ("loss",), values(NAN))
    with pytest.raises(ModelError, match=r"not finite since step 4;.*--learning-rate"):
        metrics.catch_up()


def test_one_process_that_is_asked_to_stop_stops_all(tmp_path):
    metrics = StepMetrics(CPU, tmp_path)
    metrics.add(1, (), torch.tensor([1.0, 0.0]))
    metrics.catch_up()
    assert not metrics.stop_requested
    metrics.add(2, (), torch.tensor([1.0, 0.5]))  # the mean over two processes
    metrics.catch_up()
    assert metrics.stop_requested


class Reads(TorchDispatchMode):
    """Records operations that synchronise with a GPU: `item`, `float`, `bool`, `equal`, mask and list indexing."""

    waiting = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = str(function).startswith("aten.index.") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or str(function).startswith(self.waiting):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def tasks(tmp_path):
    shared = {"preset": "small", "dataset": "synthetic-regular", "output_dir": str(tmp_path), "batch_size": 1}
    shared |= {"mixed_precision": "bf16", "memory_format": "channels_last"}
    volumes = load_volumes("synthetic-regular")
    config = make_config(DiffusionConfig, **shared, width=8, sample_size=24)
    yield config, DiffusionTraining(config, (50, 50, 50)), volumes
    nested = {"parent": "synthetic-regular", "teacher_noise": "fixed", "stages": (1, 2), "num_parts": 12}
    for more in ({"num_parts": 3}, {**nested, "children": (1, 1, 2, 1, 2, 1, 2, 2)}):
        config = make_config(DiscoveryConfig, **shared, teacher="synthetic-regular", dropout=0.2, **more)
        from diffdiscover3d.hub.registry import load_discovery

        parent = load_discovery(config.parent) if config.parent else None
        teacher = load_teacher("synthetic-regular")
        accelerator = make_accelerator(config)
        yield config, DiscoveryTraining(config, teacher, volumes, volumes, accelerator, parent=parent), volumes


def take_step(task, model, optimizer, batches, config, accelerator, step):
    """One step of a training that is not asked to stop."""
    backward = EagerPass(lambda batch: task.losses(model, batch), accelerator.backward)
    stop = SimpleNamespace(requested=False)
    return _take_step(task, model, optimizer, backward, batches, config, accelerator, step, [], stop)


def test_a_step_reads_nothing_from_the_device(tmp_path):
    """On a GPU, each of these would synchronise with all queued work."""
    for config, task, volumes in tasks(tmp_path):
        accelerator = make_accelerator(config)
        optimizer = torch.optim.Adam([p for p in task.model.parameters() if p.requires_grad], fused=True)
        model, optimizer = accelerator.prepare(task.model.train(), optimizer)
        batches = [dict(b) for b, _ in zip(_make_loader(task, config, volumes, accelerator, 0), range(2), strict=False)]
        # the first step may compute cached constants and fixed teacher outputs
        take_step(task, model, optimizer, iter([dict(batches[0])]), config, accelerator, 0)
        with Reads() as reads:
            take_step(task, model, optimizer, iter([dict(batches[0])]), config, accelerator, 1)
        assert reads.found == [], task.name


def test_batches_are_put_together_ahead_and_in_order():
    main, made, threads = threading.get_ident(), [], set()

    def source():
        for number in range(4):
            threads.add(threading.get_ident())
            made.append(number)
            yield {"number": number}

    batches = _read_ahead(source())
    assert next(batches)["number"] == 0
    assert [b["number"] for b in batches] == [1, 2, 3] and made == [0, 1, 2, 3]
    assert main not in threads


def test_an_error_of_the_loader_arrives():
    def source():
        yield {"number": 0}
        raise ModelError("a volume went missing")

    batches = _read_ahead(source())
    next(batches)
    with pytest.raises(ModelError, match="went missing"):
        next(batches)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_shards_is_refused(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert main(["diffusion", "--preset", "small", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "must not shard" in error and "--multi_gpu" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(fused, tmp_path, monkeypatch):
    """On devices where the optimiser cannot skip steps, such as mps, the host skips them."""
    config = make_config(DiffusionConfig, mixed_precision="no", output_dir=str(tmp_path))
    accelerator = make_accelerator(config)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = model.weight.detach().clone()
    for step, scale in enumerate((NAN, 1.0)):
        task = SimpleNamespace(
            prepare=lambda batch: batch,
            losses=lambda m, batch, scale=scale: {"loss": scale * m(batch["volume"]).sum()},
        )
        batch = {"volume": torch.ones(1, 2), "slot": torch.zeros(1, dtype=torch.long)}
        _, values = take_step(task, model, optimizer, iter([batch]), config, accelerator, step)
        assert values[-2] == (0 if step == 0 else 1)
        assert torch.isfinite(model.weight).all() and torch.equal(model.weight, before) == (step == 0)
