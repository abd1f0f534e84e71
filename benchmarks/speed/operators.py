"""Dispatched operators, operations and bytes of a training step and of features, counted on the meta device.

    python -m benchmarks.speed.operators > FILE && mv FILE benchmarks/results/operators.json

No GPU is needed: the meta device takes the code for accelerators and computes only shapes. Of the denoiser's training
step, forward and backward pass are counted, without the optimiser. The first backward pass is counted, in which each
parameter gets a new gradient.

Features of a stage, in bfloat16 and up to that stage, are compared with hooks on the whole network in float32: the
times are estimates, the least ones at the peaks that `gpu.json` has for its GPU. A replayed CUDA graph comes near such
times; launched one by one, operators take longer.
"""

import collections
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import RESULTS
from benchmarks.speed.baselines import hooked_features
from benchmarks.speed.budget import unet_parts
from benchmarks.speed.meter import Meter, watched
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.utils.files import read_json
from diffdiscover3d.utils.provenance import describe_environment

BATCH = 4
REST = "entry and the rest"
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")  # operators that wait for the device


class Counter(TorchDispatchMode):
    """Counts what is dispatched by name and by part, before operators are taken apart as [`Meter`] does."""

    def __init__(self):
        super().__init__()
        self.part = ""
        self.names: collections.Counter = collections.Counter()
        self.parts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function._overloadpacket.__name__] += 1
        self.parts[self.part] += 1
        return function(*args, **(kwargs or {}))


def count_step(preset: str) -> dict:
    """Count one step of a preset with a batch of 4.

    Returns:
        `operators`, `casts` and `synchronising` (numbers of operators), `gflop`, `gigabytes` (as if each operator read
        its inputs and wrote its outputs once, in float32), `parts` with the same of each part, and `names`, how often
        each operator was dispatched.
    """
    side = UNET_PRESETS[preset]["sample_size"]
    with torch.device("meta"):
        unet = UNet3DModel(**UNET_PRESETS[preset])
        x, steps = torch.randn(BATCH, 1, side, side, side), torch.zeros(BATCH, dtype=torch.long)
    meter, counter = Meter(), Counter()

    def mark(part: str) -> None:
        meter.part = counter.part = part

    mark(REST)
    # the counter is entered last, so that it sees each operator first
    with watched(unet_parts(unet), mark, lambda part: mark(REST)), meter, counter:
        loss = F.l1_loss(unet(x, steps).sample.float(), x)
        mark("backward")
        loss.backward()
    parts = {
        name: {
            "operators": counter.parts[name],
            "gflop": sum(tally.flops.values()) / 1e9,
            "gigabytes": tally.bytes / 1e9,
        }
        for name, tally in meter.parts.items()
    }
    return {
        **{key: sum(part[key] for part in parts.values()) for key in ("operators", "gflop", "gigabytes")},
        "casts": counter.names["_to_copy"],
        "synchronising": sum(counter.names[name] for name in READS),
        "parts": parts,
        "names": dict(counter.names.most_common()),
    }


def peaks_of(rows: Sequence[dict]) -> dict:
    """The peaks that `gpu.py` measured, as [`Meter`] takes them."""
    values = {row["what"]: row["value"] for row in rows}
    rates = {kind: 1e12 * values[f"matrix product {kind}"] for kind in ("float32", "bfloat16")}
    return {"flop_per_second": rates, "bytes_per_second": 1e12 * values["copy"]}


@torch.no_grad()
def estimate_features(preset: str, stage: int, peaks: dict) -> dict:
    """The least times of the features of one volume.

    Returns:
        For the package and for hooks the milliseconds `ours_ms` and `hooks_ms`, `ours_gflop` and `hooks_gflop`, and
        `times`, the ratio of the two times.
    """
    side = UNET_PRESETS[preset]["sample_size"]
    found: dict = {"preset": preset, "stage": stage}
    for name, dtype in (("ours", torch.bfloat16), ("hooks", torch.float32)):
        with torch.device("meta"):
            unet = UNet3DModel(**UNET_PRESETS[preset]).eval().to(dtype)
            x, steps = torch.randn(1, 1, side, side, side, dtype=dtype), torch.zeros(1, dtype=torch.long)
        with Meter(peaks) as meter:
            if name == "ours":
                unet(x, steps, stages=(stage,), return_sample=False)
            else:
                hooked_features(unet, x, steps, (stage,))
        found[f"{name}_ms"] = 1e3 * meter.parts["all"].least_seconds
        found[f"{name}_gflop"] = meter.total_flops / 1e9
    return {**found, "times": found["hooks_ms"] / found["ours_ms"]}


def main() -> None:
    """Print the counts of the presets as JSON."""
    counts = {preset: count_step(preset) for preset in ("paper", "small")}
    gpu = read_json(RESULTS / "gpu.json")
    peaks = peaks_of(gpu["rows"])
    features = [estimate_features(preset, stage, peaks) for preset in counts for stage in (1, 2, 3)]
    found = {"batch": BATCH, "presets": counts, "features": features, "peaks": peaks, "peaks_of": gpu["gpu"]["name"]}
    print(json.dumps({**found, "environment": describe_environment()}, indent=1))


if __name__ == "__main__":
    main()
