"""Parts that k-means finds in the teacher's signals: one choice changed at a time, without any training.

    python -m benchmarks.explorations.signals              (about ten minutes on one core)

k-means divides each validation volume by a signal of the embedded diffusion model: at level 1 the whole volume, at
levels 2 and 3 the parts that the embedded network divides there, as it found them. The base is the features of the
level's own stage and the clean prediction, each at t = 25 and averaged over 4 draws of noise; every row changes one
thing of it. The scaling is computed for each part that is divided, as in the consistencies of the training.
Writes `results/signals.json`.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from benchmarks import RESULTS
from diffdiscover3d.baselines.features_kmeans import join_equally
from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.evaluation.metrics import dataset_dice, dice_matrix
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeatureOutput, DiffusionFeaturePipeline
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

MODEL = "synthetic-regular"  # also the name of its data
SPLIT = "validation"


@dataclass(frozen=True)
class Trial:
    """A signal, and how its channels are weighed.

    Attributes:
        changes: what is varied here.
        stages: of the features; none: the clean prediction.
        timestep: noise step t.
        draws: of noise, over which the signal is averaged.
        scaling: "equal", every stage to the same total variance, or the one with most channels would speak alone;
            "plain", as they are; "standardised", each channel to variance 1; "whitened", decorrelated as well.
    """

    changes: str
    stages: tuple[int, ...] = ()
    timestep: int = 25
    draws: int = 4
    scaling: str = "equal"


def trials(level: int) -> Iterator[Trial]:
    """Everything that is tried at a level."""
    own, clean = Trial("base", (level,)), Trial("base")
    yield from (own, clean)
    for timestep in (10, 60, 100, 150):
        yield replace(own, changes="timestep", timestep=timestep)
        yield replace(clean, changes="timestep", timestep=timestep)
    for draws in (1, 2, 8):
        yield replace(own, changes="draws", draws=draws)
        yield replace(clean, changes="draws", draws=draws)
    for scaling in ("standardised", "whitened"):
        yield replace(own, changes="scaling", scaling=scaling)
    for stages in ((1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3)):
        if stages != (level,):
            yield replace(own, changes="stages", stages=stages)
    yield Trial("weights of stages", (1, 2, 3), scaling="plain")


def scale(maps: Sequence[np.ndarray], scaling: str) -> np.ndarray:
    """Put (voxels, channels) maps of stages side by side, their channels weighed."""
    if scaling == "equal":
        return join_equally(maps) if len(maps) > 1 else maps[0]
    signal = np.concatenate(maps, axis=1)
    if scaling == "plain":
        return signal
    centred = signal - signal.mean(axis=0)
    if scaling == "standardised":
        return centred / (centred.std(axis=0) + 1e-6)
    variances, axes = np.linalg.eigh(np.cov(centred, rowvar=False))
    floor = 1e-3 * variances[-1]  # directions that hold nothing but rounding stay small
    return centred @ (axes / np.sqrt(np.maximum(variances, 0) + floor))


def divide(
    maps: Sequence[np.ndarray], parents: np.ndarray, children: Sequence[int], scaling: str, seed: int
) -> np.ndarray:
    """k-means on (voxels, channels) maps inside each part that has children; numbers run through the parents' order."""
    labels, first = np.zeros(len(parents), np.uint8), 0
    for part, count in enumerate(children):
        within = parents == part
        if count > 1 and within.sum() >= count:
            clusters = MiniBatchKMeans(count, n_init=3, batch_size=4096, random_state=seed)
            labels[within] = first + clusters.fit_predict(scale([m[within] for m in maps], scaling))
        else:
            labels[within] = first
        first += count
    return labels


def voxelwise(found: DiffusionFeatureOutput, stages: Sequence[int]) -> list[np.ndarray]:
    """(voxels, channels) of each stage asked for, or where none is of the clean prediction."""
    if not stages:
        return [found.denoised.reshape(-1, 1).numpy()]
    return [found.features[s - 1][0].flatten(1).T.numpy() for s in stages]


def parents_of(network: StructureDiscoveryModel, volume: torch.Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The parts that a network divides, voxel by voxel, and into how many; without a parent one that is everything."""
    labels = network.label_parents(volume[None])
    if labels is None:
        return np.zeros(volume.numel(), np.int64), (network.config.num_parts,)
    return labels.flatten().numpy(), tuple(network.config.children)


def ask(teacher: DiffusionFeaturePipeline, volume: torch.Tensor, timestep: int, draws: int) -> DiffusionFeatureOutput:
    """All signals of a volume; more draws begin with the same ones."""
    generator = torch.Generator().manual_seed(0)
    return teacher(volume[None], timestep, (1, 2, 3), generator, draws, upsample=True, denoised=True)


def measure(volumes: Sequence[dict], seed: int) -> list[dict]:
    """One row for each level and trial."""
    teacher, networks = load_teacher(MODEL), load_discovery(MODEL).levels
    plan = [(level, n, t) for level, n in zip(LEVEL_PARTS, networks, strict=True) for t in trials(level)]
    matrices: list[list[np.ndarray]] = [[] for _ in plan]
    for i in range(len(volumes)):
        volume, true = volumes[i]["volume"], volumes[i]["labels"]
        needed = sorted({(t.timestep, t.draws) for _, _, t in plan})
        signals = {wanted: ask(teacher, volume, *wanted) for wanted in needed}
        parents = [parents_of(network, volume) for network in networks]
        for (level, _, trial), into in zip(plan, matrices, strict=True):
            maps = voxelwise(signals[trial.timestep, trial.draws], trial.stages)
            found = divide(maps, *parents[level - 1], trial.scaling, seed)
            parts = LEVEL_PARTS[level]
            into.append(dice_matrix(found.reshape(volume.shape[1:]), true[level - 1].numpy(), parts, parts))
        print(f"volume {i + 1} of {len(volumes)}", flush=True)
    return [
        {"level": level, **asdict(trial), **dataset_dice(np.stack(found))}
        for (level, _, trial), found in zip(plan, matrices, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the clustering")
    options = parser.parse_args()
    volumes = load_volumes(MODEL, SPLIT)
    rows = measure(volumes, options.seed)
    result = {
        "command": f"python -m benchmarks.explorations.signals --seed {options.seed}",
        "what": "k-means on the signals of the embedded diffusion model, inside the parts the embedded network divides",
        "model": MODEL,
        "split": SPLIT,
        "volumes": len(volumes),
        "seed": options.seed,
        "generator_version": GENERATOR_VERSION,
        "environment": describe_environment(),
        "rows": rows,
    }
    write_json(RESULTS / "signals.json", result)


if __name__ == "__main__":
    main()
