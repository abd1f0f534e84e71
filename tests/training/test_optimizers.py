"""The optimiser of the options, learning rate schedules, and the checkpoint of an optimiser's state."""

import math
import sys

import pytest
import torch
from diffusers.optimization import get_scheduler

from diffdiscover3d.training import checkpoints
from diffdiscover3d.training.config import SCHEDULES, DiffusionConfig, make_config
from diffdiscover3d.training.optimizers import check_8bit_adam, make_optimizer, skips_on_device
from diffdiscover3d.training.schedules import learning_rate_at

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "one_cycle"])
def test_schedules_are_those_of_diffusers(name):
    warmup = 0 if name == "constant" else 5
    config = make_config(DiffusionConfig, lr_schedule=name, lr_warmup_steps=warmup, max_steps=30, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(30):
        assert learning_rate_at(config, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_cosine_and_one_cycle_by_formula():
    cosine = make_config(DiffusionConfig, lr_schedule="cosine", lr_warmup_steps=4, max_steps=20, learning_rate=2.0)
    for step in range(20):
        expected = 2 * step / 4 if step < 4 else 1 + math.cos(math.pi * (step - 4) / 16)
        assert learning_rate_at(cosine, step) == pytest.approx(expected)
    cycle = make_config(DiffusionConfig, lr_schedule="one_cycle", lr_warmup_steps=4, max_steps=20, learning_rate=2.0)
    assert [learning_rate_at(cycle, step) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_takes_the_options(decay):
    """Two steps against the formulas of Adam and AdamW in float64."""
    values = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-3, "adam_weight_decay": decay}
    config = make_config(DiffusionConfig, learning_rate=0.01, **values)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer(config, [parameter], CPU)
    assert isinstance(optimizer, torch.optim.AdamW) == (decay > 0) and skips_on_device(optimizer)
    x, m, v = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.0, 0.0
    for step, gradient in enumerate((torch.tensor([0.5, 3.0]), torch.tensor([-1.0, 2.0])), start=1):
        parameter.grad = gradient
        optimizer.step()
        g = gradient.double()
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g**2
        x = x * (1 - 0.01 * decay)
        x = x - 0.01 * (m / (1 - 0.7**step)) / ((v / (1 - 0.8**step)).sqrt() + 1e-3)
        torch.testing.assert_close(parameter.detach().double(), x, rtol=1e-6, atol=0)


def test_8bit_adam_needs_a_gpu_and_bitsandbytes(monkeypatch):
    config = make_config(DiffusionConfig, use_8bit_adam=True)
    with pytest.raises(ValueError, match="`use_8bit_adam` requires a CUDA GPU, got the device cpu; leave it out"):
        make_optimizer(config, [torch.nn.Parameter(torch.zeros(1))], CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install diffdiscover3d\[bitsandbytes\]"):
        check_8bit_adam(config, torch.device("cuda"))


class Counting(torch.optim.Optimizer):
    """Keeps its steps as an integer, as the optimisers of bitsandbytes do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state["moment"] = torch.full_like(parameter, state["step"])


def test_numbers_of_steps_are_saved_as_integers(tmp_path):
    parameters = [torch.nn.Parameter(torch.ones(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)) for _ in "ab"]
    before, after = Counting(parameters[:1]), Counting(parameters[1:])
    before.step()
    before.step()
    tensors = {"model": {"p": parameters[0].detach()}, "optimizer": checkpoints.pack_optimizer(before)}
    loaded, _ = checkpoints.load_checkpoint(checkpoints.save_checkpoint(tmp_path, 2, tensors, {}))
    checkpoints.unpack_optimizer(after, loaded["optimizer"])
    state = after.state[parameters[1]]
    assert state["step"] == 2 and isinstance(state["step"], int)
    assert state["moment"].unique().tolist() == [2] and state["moment"].stride() == parameters[1].stride()
