"""Operators dispatched by a training step on an accelerator. They must not grow: a GPU waits for the host."""

import pytest

from benchmarks.speed.operators import count_step


@pytest.mark.parametrize(
    ("preset", "operators", "convolutions", "gflop"),
    # 49 and 48 convolutions are those of the layers: one for each, the 1x1 ones of attention are matrix products
    [("paper", 1330, 49, (8000, 9500)), ("small", 550, 48, (200, 250))],
)
def test_a_step_dispatches_few_operators(preset, operators, convolutions, gflop):
    counted = count_step(preset)
    # `detach` starts no kernel, and versions of torch call it more or less often
    assert counted["operators"] - counted["names"]["detach"] <= operators
    assert counted["names"]["convolution"] == convolutions
    assert counted["names"]["convolution_backward"] == convolutions  # nothing is computed twice
    assert counted["casts"] <= 2 and counted["synchronising"] == 0
    assert gflop[0] < counted["gflop"] < gflop[1]
    assert sum(part["operators"] for part in counted["parts"].values()) == counted["operators"]
