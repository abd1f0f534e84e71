"""How long the recipe `small` of one variant takes from nothing: diffusion model, then all levels of discovery.

    python -m benchmarks.speed.recipe FOLDER > FILE

All discovery trainings run to their end, from the embedded diffusion model. Of the diffusion training only the first
steps run; its time is that of a step, start-up left out, times the number of steps of the recipe. Use a quiet machine:
the load before and after is recorded. Discovery models are kept in FOLDER, so
that an interrupted call resumes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from diffdiscover3d.evaluation.paper_tables import Cell, PaperTable, run_in_process
from diffdiscover3d.training.config import DiffusionConfig, make_config
from diffdiscover3d.training.recipes import RECIPES, Recipe, diffusion_training
from diffdiscover3d.utils.provenance import describe_environment

TEACHER = "synthetic-regular"


def seconds_per_step(variant: str, steps: int) -> float:
    """Seconds of a diffusion step: the difference between a training of `steps` and one of `steps` / 5, by steps."""
    taken = []
    for count in (steps // 5, steps):
        recipe = Recipe({**RECIPES["small"].diffusion, "max_steps": count}, {}, nested=False)
        with tempfile.TemporaryDirectory() as folder:
            training = diffusion_training(recipe, f"synthetic-{variant}", 0, Path(folder) / "model")
            clock = time.perf_counter()
            run_in_process(training.arguments())
            taken.append(time.perf_counter() - clock)
    return (taken[1] - taken[0]) / (steps - steps // 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=("regular", "irregular"), default="regular")
    parser.add_argument("--method", default="ours", help="row of table 1 whose trainings are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--diffusion-steps", type=int, default=100, help="of the diffusion training that is timed")
    options = parser.parse_args()
    load = os.getloadavg()
    table, trainings = PaperTable(options.folder, teacher=TEACHER, split="validation"), {}
    for level in (1, 2, 3):
        row = table.fill(Cell(options.variant, options.method, level, options.seed))
        trainings[f"level {level}"] = {"seconds": row["training_seconds"], "dice_validation": round(row["dice"], 4)}
        print(level, trainings[f"level {level}"], file=sys.stderr, flush=True)
    step = seconds_per_step(options.variant, options.diffusion_steps)
    steps = make_config(DiffusionConfig, **RECIPES["small"].diffusion).max_steps
    discovery = sum(training["seconds"] for training in trainings.values())
    result = {
        "command": f"python -m benchmarks.speed.recipe FOLDER --variant {options.variant} --seed {options.seed}",
        "method": options.method,
        "discovery": trainings,
        "discovery_minutes": round(discovery / 60, 1),
        "diffusion_seconds_per_step": round(step, 3),
        "diffusion_steps": steps,
        "diffusion_minutes_estimated": round(step * steps / 60, 1),
        "minutes": round((discovery + step * steps) / 60, 1),
        "load_average_before": load,
        "load_average_after": os.getloadavg(),
        "environment": describe_environment(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
