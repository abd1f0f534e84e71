"""Share of voxels with the labels of float32: python -m benchmarks.speed.half_precision > FILE."""

import argparse
import json

import numpy as np
import torch

COMMAND = "python -m benchmarks.speed.half_precision"


def main() -> None:
    """The embedded models of synthetic cells on test volumes, every level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=5, help="test volumes of each variant")
    arguments = parser.parse_args()
    from diffdiscover3d import StructureDiscoveryModel, synthesize
    from diffdiscover3d.utils.provenance import describe_environment

    rows = []
    for variant in ("regular", "irregular"):
        name = f"synthetic-{variant}"
        volumes = [synthesize(variant, "test", i).volume for i in range(arguments.volumes)]
        models = {
            dtype: StructureDiscoveryModel.from_pretrained(name, dtype=dtype).levels
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        for level, exact in enumerate(models[torch.float32]):
            expected = [exact.segment(volume).labels for volume in volumes]
            for dtype in (torch.bfloat16, torch.float16):
                found = [models[dtype][level].segment(volume).labels for volume in volumes]
                shares = [float((a == b).float().mean()) for a, b in zip(found, expected, strict=True)]
                rows.append(
                    {
                        "model": name,
                        "level": level + 1,
                        "dtype": str(dtype).removeprefix("torch."),
                        "mean_share": round(float(np.mean(shares)), 6),
                        "smallest_share": round(min(shares), 6),
                    }
                )
    result = {"command": COMMAND, "volumes": arguments.volumes, "rows": rows, "environment": describe_environment()}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
