"""Write down what a discovery training of the exploration came to, on the validation volumes of its own dataset.

    python -m benchmarks.explorations.trainings NAME=FOLDER [NAME=FOLDER ...] --output results/FILE.json

FOLDER is the output of `python -m diffdiscover3d.train discovery`. For each: the options that are not those of the
preset, the loss at its end (mean over the last quarter of the log), the Dice of every level it holds, and the share of
the true inclusions that lie outside of the cell it found, where no finer level can find them. Rows of a file that have
another name are kept.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.evaluation.synthetic import score
from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.training.config import DiscoveryConfig, make_config
from diffdiscover3d.training.recipes import final_loss
from diffdiscover3d.utils.files import read_json, write_json
from diffdiscover3d.utils.provenance import describe_environment, weights_sha256

SPLIT = "validation"


def changed_options(folder: Path, names: Mapping[Path, str]) -> dict:
    """Options of a training that its preset does not have; folders are called by their names, or by where they lay."""
    given = read_json(folder / "train_config.json")
    preset = given.pop("preset")
    usual = dataclasses.asdict(make_config(DiscoveryConfig, preset=preset, dataset="", teacher="", num_parts=2))
    technical = {"mixed_precision", "memory_format", "log_every", "checkpoint_every", "preview_every"}
    changed = {"preset": preset}
    for key, value in given.items():
        if key in technical or value == usual[key] or (isinstance(value, list) and value == list(usual[key] or ())):
            continue
        if key in ("init_from", "parent", "teacher", "dataset"):
            value = names.get(Path(value), "/".join(Path(value).parts[-3:]))  # local paths are stripped
        changed[key] = value
    return changed


def lost_inclusions(cell: StructureDiscoveryModel, volumes) -> dict[str, float]:
    """Inclusions outside of the cell that was found, and whether the variance of the intensities favours that.

    The cell that was found is the part that overlaps the true one most.

    Returns:
        `outside`: share of the voxels of true inclusions outside of the cell; `variance_left`: the share of the
        intensities' variance that the two parts leave, mean over the volumes; `variance_left_with_them`: the same if
        all inclusions were part of the cell.
    """
    lost = there = 0
    left, left_with_them = [], []
    for i in range(len(volumes)):
        volume = volumes[i]["volume"]
        found = cell.segment(volume[None]).labels[0].numpy()
        coarse, fine = volumes[i]["labels"][0].numpy(), volumes[i]["labels"][1].numpy()
        overlaps = [2 * ((found == p) & (coarse > 0)).sum() / ((found == p).sum() + (coarse > 0).sum()) for p in (0, 1)]
        within, inclusions = found == overlaps.index(max(overlaps)), fine > 1
        lost += (inclusions & ~within).sum()
        there += inclusions.sum()
        left.append(variance_left(volume[0].numpy(), within))
        left_with_them.append(variance_left(volume[0].numpy(), within | inclusions))
    return {
        "outside": round(float(lost / there), 4),
        "variance_left": round(float(np.mean(left)), 4),
        "variance_left_with_them": round(float(np.mean(left_with_them)), 4),
    }


def variance_left(values: np.ndarray, within: np.ndarray) -> float:
    """Share of the variance that two parts leave unexplained."""
    inside = [np.var(values[mask]) * mask.mean() for mask in (within, ~within) if mask.any()]
    return float(sum(inside) / np.var(values))


def describe(name: str, folder: Path, names: Mapping[Path, str]) -> dict:
    """One row."""
    options = changed_options(folder, names)
    volumes, networks = load_volumes(options["dataset"], SPLIT), load_discovery(str(folder)).levels
    levels = {parts: level for level, parts in LEVEL_PARTS.items()}
    dice = {}
    for network in networks:
        level = levels[network.config.num_parts]
        found = score(lambda v, n=network: n.segment(v[None]).labels[0].numpy(), volumes, level)
        dice[f"level {level}"] = {k: round(v, 4) for k, v in found.items() if k != "seconds"}
    coarsest = networks[0] if networks[0].config.num_parts == 2 else None
    return {
        "name": name,
        "options": options,
        "final_loss": round(final_loss(folder), 4),
        **dice,
        "inclusions": coarsest and lost_inclusions(coarsest, volumes),
        "weights_sha256": weights_sha256(folder),
        "generator_version": GENERATOR_VERSION,
        "environment": describe_environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainings", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.trainings)
    names = {Path(folder): name for name, folder in given.items()}
    rows = {row["name"]: row for row in read_json(options.output)["rows"]} if options.output.exists() else {}
    for name, folder in given.items():
        rows[name] = describe(name, Path(folder), names)
        print({k: v for k, v in rows[name].items() if k not in ("environment", "weights_sha256")}, flush=True)
    result = {
        "command": "python -m benchmarks.explorations.trainings NAME=FOLDER ... --output FILE",
        "split": SPLIT,
        "rows": list(rows.values()),
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
