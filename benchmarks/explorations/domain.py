"""Describe what the embedded models were trained on, and measure how far other volumes are from it.

    python -m benchmarks.explorations.domain [SCAN ...]

Writes `domain.json` beside each embedded network, from the synthetic training cells, and the distances of all
synthetic test cells and of the scans given to `benchmarks/results/domain.json`. Scans are named by their file names.
"""

import sys

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.synthetic import SPLITS, VARIANTS, synthesize
from diffdiscover3d.data.domain import DOMAIN_FILE, FAR, describe_block, distance, signature, summarise
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import display_name
from diffdiscover3d.hub.registry import embedded_models
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

RESULT = RESULTS / "domain.json"


def cells(variant: str, split: str) -> list[list[float]]:
    """The signatures of all cells of a split."""
    found = []
    for index in range(SPLITS[split]):
        volume = synthesize(variant, split, index).volume
        found.append(describe_block((volume - volume.min()) / (volume.max() - volume.min())))
    return found


def main(scans: list[str]) -> None:
    """Write the files and print the distances."""
    tests = {variant: cells(variant, "test") for variant in VARIANTS}
    others = {display_name(scan): signature(read_volume(scan)) for scan in scans}
    results = {}
    for name, model in embedded_models().items():
        domain = summarise(cells(name.removeprefix("synthetic-"), "train"))
        write_json(model.discovery / DOMAIN_FILE, domain)
        results[name] = {
            "synthetic_test_largest": {
                variant: round(max(distance(numbers, domain)[0] for numbers in found), 3)
                for variant, found in tests.items()
            },
            "scans": {scan: round(distance(numbers, domain)[0], 3) for scan, numbers in others.items()},
        }
        print(name, results[name])
    write_json(RESULT, {"threshold": FAR, "models": results, "environment": describe_environment()})


if __name__ == "__main__":
    main(sys.argv[1:])
