"""The exact region-consistency loss against Eq. 5 written directly: time, peak memory, agreement.

    python benchmarks/loss.py --output benchmarks/results/loss.json

Each case runs in a process of its own, so that its peak memory is its own; both ways run in the same order three times
and the fastest counts. Times depend on the machine, their ratio hardly does.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from diffdiscover3d.files import write_json
from diffdiscover3d.losses import region_consistency
from diffdiscover3d.reporting.provenance import describe_environment, peak_memory_mib

# name: (parts, channels by coarse grid, voxel grid, whether Eq. 5 written directly fits as well)
CASES = {
    "K8_C256_8to50": (8, [(256, (8, 8, 8))], (50, 50, 50), True),
    "K3_C128_32to100": (3, [(128, (32, 32, 32))], (100, 100, 100), False),
    "K3_C448_three_stages_200x200x155": (
        3,
        [(256, (25, 25, 20)), (128, (50, 50, 39)), (64, (100, 100, 78))],
        (200, 200, 155),
        False,
    ),
}
REPEATS = 3


def eq5(masks: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 5 as the paper states it: upsample all channels, then average and square part by part."""
    grid = masks.shape[2:]
    h = torch.cat([F.interpolate(f, size=grid, mode="trilinear", align_corners=True) for f in features], dim=1)
    total = 0
    for k in range(masks.shape[1]):
        m = masks[:, k : k + 1]
        z = (m * h).sum(dim=(2, 3, 4), keepdim=True) / m.sum(dim=(2, 3, 4), keepdim=True)
        total = total + (m * (z - h) ** 2).sum(dim=(1, 2, 3, 4))
    return (total / masks[0, 0].numel()).mean()


def measure(case: str, way: str) -> dict:
    """Forward and backward of one way on one case, in this process."""
    parts, maps, grid, _ = CASES[case]
    torch.manual_seed(0)
    logits = torch.randn(1, parts, *grid, requires_grad=True)
    features = [torch.randn(1, channels, *coarse) for channels, coarse in maps]
    loss = {"exact": region_consistency, "direct": eq5}[way]
    before = peak_memory_mib()
    seconds = []
    for _ in range(REPEATS):
        logits.grad = None
        clock = time.perf_counter()
        value = loss(logits.softmax(dim=1), features)
        value.backward()
        seconds.append(time.perf_counter() - clock)
    return {
        "value": value.item(),
        "gradient_norm": logits.grad.norm().item(),
        "seconds": min(seconds),
        "peak_mib": peak_memory_mib(),
        "peak_above_inputs_mib": peak_memory_mib() - before,
    }


def main() -> None:
    """Run every case, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loss.json"))
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    results = {}
    for case, (*_, both) in CASES.items():
        row = {}
        for way in ("exact", "direct") if both else ("exact",):
            command = [sys.executable, __file__, "--worker", case, way]
            row[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if both:
            row["speedup"] = row["direct"]["seconds"] / row["exact"]["seconds"]
            ratio = row["direct"]["peak_above_inputs_mib"] / row["exact"]["peak_above_inputs_mib"]
            row["memory_ratio"] = ratio
        results[case] = row
        print(case, json.dumps(row, indent=2))
    write_json(options.output, {"seed": 0, "cases": results, "environment": describe_environment()})


if __name__ == "__main__":
    main()
