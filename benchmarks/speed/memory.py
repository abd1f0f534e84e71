"""Peak memory of segmentation beside the estimate users are told: python -m benchmarks.speed.memory > FILE."""

import argparse
import json
import subprocess
import sys

SHAPES = [
    (64, 64, 64),
    (128, 128, 128),
    (200, 200, 155),
    (256, 256, 256),
    (300, 300, 260),
]  # over the last a window slides
PARTS = (2, 8)
PROBE = """
import json, resource, sys, time, torch
from diffdiscover3d.segmentation.memory import segmentation_bytes
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
shape, parts = tuple(json.loads(sys.argv[1])), int(sys.argv[2])
model = StructureDiscoveryModel(num_parts=parts).eval().to(memory_format=torch.channels_last_3d)  # as load_discovery
volume = torch.rand(shape)
before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
model.segment(volume)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
estimate = segmentation_bytes(shape, model.config)
print(json.dumps({"shape": shape, "parts": parts, "peak_gib": round(peak / 2**30, 3),
    "estimate_gib": round(estimate / 2**30, 3), "seconds": round(time.perf_counter() - clock, 1)}))
"""


def main() -> None:
    """One process for each shape, because a process's peak never falls."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    from diffdiscover3d.utils.provenance import describe_environment

    rows = []
    for shape in SHAPES:
        for parts in PARTS:
            command = [sys.executable, "-c", PROBE, json.dumps(shape), str(parts)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr)
    print(json.dumps({"rows": rows, "environment": describe_environment()}, indent=2))


if __name__ == "__main__":
    main()
