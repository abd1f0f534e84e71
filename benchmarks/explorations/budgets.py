"""Whether longer trainings bring a baseline nearer to its published scores.

    python -m benchmarks.explorations.budgets FOLDER cicek --level 2 steps=1000 steps=4000

trains the preset `small` with each change of a hyper-parameter on the regular variant, with the labels the method is
allowed, and scores it on the validation volumes. Checkpoints are kept in FOLDER, and rows in `results/budgets.json`.
"""

import argparse
import json
from pathlib import Path

from benchmarks import RESULTS
from diffdiscover3d.baselines.supervision import LimitedLabels
from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.evaluation.methods import METHODS
from diffdiscover3d.evaluation.published import published_dice
from diffdiscover3d.evaluation.synthetic import score
from diffdiscover3d.utils.files import read_json, write_json
from diffdiscover3d.utils.provenance import describe_environment

DATASET = "synthetic-regular"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("method", choices=[name for name, method in METHODS.items() if method.trained])
    parser.add_argument("--level", type=int, choices=tuple(LEVEL_PARTS), default=2)
    parser.add_argument("changes", nargs="+", help="NAME=VALUE of a hyper-parameter, several joined by commas")
    arguments = parser.parse_args()
    method, target = METHODS[arguments.method], RESULTS / "budgets.json"
    true = load_volumes(DATASET, "train")
    volumes = LimitedLabels(true, lambda i: true[i]["labels"][arguments.level - 1], method.labels, 0)
    for change in arguments.changes:
        fields = {name: json.loads(value) for name, value in (pair.split("=") for pair in change.split(","))}
        baseline = method.baseline(LEVEL_PARTS[arguments.level], preset="small", seed=0, **fields)
        baseline.fit(volumes, arguments.folder / f"{arguments.method}-{change}")
        row = {
            "method": method.title,
            "level": arguments.level,
            "change": fields,
            **score(baseline.predict, load_volumes(DATASET, "validation"), arguments.level),
            "published": published_dice(arguments.method, "regular", arguments.level),
            "training_seconds": round(baseline.training_seconds),
        }
        rows = read_json(target)["rows"] if target.exists() else []
        key = ("method", "level", "change")
        rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
        write_json(
            target, {"dataset": DATASET, "split": "validation", "rows": rows, "environment": describe_environment()}
        )
        print(row, flush=True)


if __name__ == "__main__":
    main()
