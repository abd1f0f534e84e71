"""Operators dispatched by a training step on an accelerator. They must not grow: a GPU waits for the host."""

import pytest

from benchmarks.speed.operators import count_step, estimate_features, peaks_of

VIEWS = ("detach", "slice", "view", "_unsafe_view")


@pytest.mark.parametrize(
    ("preset", "operators", "convolutions", "gflop"),
    # 49 and 48 convolutions are those of the layers: one for each, the 1x1 ones of attention are matrix products
    [("paper", 1020, 49, (8000, 9500)), ("small", 435, 48, (200, 250))],
)
def test_a_step_dispatches_few_operators(preset, operators, convolutions, gflop):
    counted = count_step(preset)
    # views start no kernel, and versions of torch take more or fewer of them
    views = sum(counted["names"][name] for name in VIEWS)
    assert counted["operators"] - views <= operators
    assert counted["names"]["convolution"] == convolutions
    assert counted["names"]["convolution_backward"] == convolutions  # nothing is computed twice
    assert counted["casts"] <= 2 and counted["synchronising"] == 0
    assert gflop[0] < counted["gflop"] < gflop[1]
    assert sum(part["operators"] for part in counted["parts"].values()) == counted["operators"]


def test_features_end_at_their_stage():
    rows = [
        {"what": "copy", "value": 2.0},
        {"what": "matrix product bfloat16", "value": 400.0},
        {"what": "matrix product float32", "value": 50.0},
    ]
    peaks = peaks_of(rows)
    assert peaks == {"flop_per_second": {"float32": 5e13, "bfloat16": 4e14}, "bytes_per_second": 2e12}
    first, last = (estimate_features("small", stage, peaks) for stage in (1, 3))
    assert first["hooks_gflop"] == last["hooks_gflop"] > last["ours_gflop"] > first["ours_gflop"]
    assert first["hooks_ms"] == last["hooks_ms"] and first["times"] > last["times"] > 3
    # no operator is faster than its operations at the peak allow
    assert first["ours_ms"] >= first["ours_gflop"] / 4e5 and last["hooks_ms"] >= last["hooks_gflop"] / 5e4
