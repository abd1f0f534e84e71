"""The script for a GPU, in tiny sizes on a simulated one."""

import json
import sys

import pytest
import torch

from benchmarks.speed import gpu as script
from tests.helpers.simulated_gpu import simulated_gpu

TRAININGS = ("small", "learning")
NETWORKS = ("ceilings", "features", "segment")


@pytest.mark.slow
@pytest.mark.parametrize("sections", [TRAININGS, NETWORKS])
def test_sections_measure_what_they_name(sections, tmp_path, monkeypatch):
    result = tmp_path / "gpu.json"
    options = ["--quick", "--budget", "3600", "--train-seconds", "12", "--output", str(result), "--sections", *sections]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    with simulated_gpu(monkeypatch) as gpu:
        if sections == NETWORKS:
            monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)  # only its gradients are wrong
        script.main()
    found = json.loads(result.read_text())
    assert not found["errors"] and found["gpu"]["name"] == "a simulated GPU"
    assert {name for name in found["details"] if name.startswith("seconds of")} == {f"seconds of {s}" for s in sections}
    rows = {row["what"]: row for row in found["rows"]}
    if sections == TRAININGS:
        (curve,) = (v for k, v in found["details"].items() if k.startswith("training"))
        assert curve["seconds"][-1][0] >= len(curve["log"]) > 0
        return
    assert [graph.replays > 0 for graph in gpu.graphs] == [True] * 6  # three stages of two presets
    for name, row in rows.items():
        if name.startswith("features"):
            assert row["difference"] < (0.03 if "bf16" in name else 1e-4)
