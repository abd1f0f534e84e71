"""The training loop of baselines: resumed exactly, never mixed with other settings."""

import pytest
import torch
from torch import nn

from diffdiscover3d.baselines.fitting import Schedule, train_network
from diffdiscover3d.errors import ModelError
from diffdiscover3d.training.checkpoints import list_checkpoints


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))


def regression(network):
    return lambda step: (network(torch.randn(8, 3)) - step).square().mean()


class Stopped(Exception):
    pass


def test_a_stopped_training_ends_where_an_uninterrupted_one_does(tmp_path):
    schedule = Schedule(20, 0.01, decay="cosine", amsgrad=True, clip=1.0)
    whole = make()
    train_network(whole, regression(whole), schedule, None, seed=3)
    part = make()

    def stopping(step):
        if step == 11:
            raise Stopped
        return regression(part)(step)

    with pytest.raises(Stopped):
        train_network(part, stopping, schedule, tmp_path, seed=3, checkpoint_seconds=0)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000011"]  # older ones are removed
    torch.manual_seed(99)  # the state of the global generator does not matter
    resumed = make()
    train_network(resumed, regression(resumed), schedule, tmp_path, seed=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_finished_training_is_loaded_with_its_seconds(tmp_path):
    network, schedule = make(), Schedule(3, 0.01)
    seconds = train_network(network, regression(network), schedule, tmp_path, seed=0)

    def never(step):
        raise AssertionError("trained again")

    again = make()
    assert train_network(again, never, schedule, tmp_path, seed=0) == seconds > 0
    assert torch.equal(again[0].weight, network[0].weight) and not again.training


def test_the_global_generator_is_left_alone():
    network = make()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_network(network, regression(network), Schedule(2, 0.1), None, seed=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("change", [{"seed": 1}, {"settings": {"patch": 7}}, {"schedule": Schedule(4, 0.02)}])
def test_other_settings_are_refused(tmp_path, change):
    network = make()
    arguments = {"schedule": Schedule(2, 0.01), "seed": 0, "settings": {"patch": 5}}
    train_network(network, regression(network), folder=tmp_path, **arguments)
    with pytest.raises(ModelError, match="made with other settings"):
        train_network(network, regression(network), folder=tmp_path, **{**arguments, **change})


def test_another_network_is_refused(tmp_path):
    network = make()
    train_network(network, regression(network), Schedule(1, 0.01), tmp_path, seed=0)
    other = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="does not fit the network"):
        train_network(other, regression(other), Schedule(1, 0.01), tmp_path, seed=0)


def test_a_loss_that_is_not_finite_ends_the_training():
    network = make()
    with pytest.raises(ModelError, match="the loss of step 1 is nan"):
        train_network(network, lambda _: network(torch.ones(2, 3)).sum() * float("nan"), Schedule(3, 0.1), None, seed=0)


def test_learning_rates():
    assert [Schedule(4, 0.8).rate(s) for s in (0, 3)] == [0.8, 0.8]
    assert Schedule(4, 0.8, decay="cosine").rate(2) == pytest.approx(0.4)
    assert Schedule(4, 0.8, decay="poly").rate(3) == pytest.approx(0.8 * 0.25**0.9)
