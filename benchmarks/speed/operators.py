"""Dispatched operators, operations and bytes of one training step of the denoiser, counted on the meta device.

    python -m benchmarks.speed.operators > benchmarks/results/operators.json

No GPU is needed: the meta device takes the code for accelerators and computes only shapes. Forward and backward pass
are counted, without the optimiser. The first backward pass is counted, in which each parameter gets a new gradient.
"""

import collections
import json

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.budget import unet_parts
from benchmarks.speed.meter import Meter, watched
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
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


def main() -> None:
    """Print the counts of the presets as JSON."""
    counts = {preset: count_step(preset) for preset in ("paper", "small")}
    print(json.dumps({"batch": BATCH, "presets": counts, "environment": describe_environment()}, indent=1))


if __name__ == "__main__":
    main()
