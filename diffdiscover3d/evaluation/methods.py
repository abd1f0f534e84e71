"""The rows of the tables: label-free baselines, the method and its ablations, and a supervised ceiling."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        title: what the table calls it.
        baseline: makes a rival, `(num_parts, teacher, seed) -> Baseline`; `None` for a trained network.
        options: what a trained network changes in the recipe.
        recipe: take another recipe of the same size, the one with this ending, such as the paper's equations
            as written.
        labels: whether it is trained on true labels.
    """

    title: str
    baseline: Callable | None = None
    options: dict = field(default_factory=dict)
    needs_teacher: bool = True
    recipe: str = ""
    labels: bool = False


def _kmeans(num_parts, teacher, seed):
    from diffdiscover3d.baselines.kmeans import IntensityKMeans

    return IntensityKMeans(num_parts, seed)


def _bm4d(num_parts, teacher, seed):
    from diffdiscover3d.baselines.bm4d_kmeans import BM4DKMeans

    return BM4DKMeans(num_parts, seed)


def _features(*stages: int) -> Callable:
    def make(num_parts, teacher, seed):
        from diffdiscover3d.baselines.features_kmeans import FeaturesKMeans

        return FeaturesKMeans(num_parts, teacher, stages, seed=seed)

    return make


def _denoised(num_parts, teacher, seed):
    from diffdiscover3d.baselines.denoised_kmeans import DenoisedKMeans

    return DenoisedKMeans(num_parts, teacher, seed=seed)


def _spatial(num_parts, teacher, seed):
    from diffdiscover3d.baselines.spatial_kmeans import SpatialKMeans

    return SpatialKMeans(num_parts, teacher, seed=seed)


METHODS: dict[str, Method] = {
    "k-means": Method("k-means", _kmeans, needs_teacher=False),
    "bm4d-k-means": Method("BM4D + k-means", _bm4d, needs_teacher=False),
    **{f"features-k-means-{s}": Method(f"features k-means, stage {s}", _features(s)) for s in (1, 2, 3)},
    "features-k-means-all": Method("features k-means, all stages", _features(1, 2, 3)),
    "spatial-k-means": Method("k-means in space, no training", _spatial),
    "denoised-k-means": Method("k-means on the clean prediction", _denoised),
    "as-written": Method("Eq. 4 as written", recipe="as-written"),
    "ours": Method("ours"),
    "consistency": Method("ours, consistencies alone", recipe="consistency"),
    "first-round": Method("ours, one round of assignments", recipe="first-round"),
    "no-space": Method("ours, no space in the assignments", options={"inclusions": "alike"}),
    "no-smooth": Method("ours, no Potts model in the assignments", options={"potts_strength": 0.0}),
    "no-recolor": Method("ours, no new intensities", options={"recolor_probability": 0.0}),
    "supervised": Method("our network trained on all labels", recipe="supervised", labels=True),
    "no-visual": Method("ours, λv = 0", options={"lambda_visual": 0.0}),
    "no-feature": Method("ours, λf = 0", options={"lambda_feature": 0.0}),
    "no-invariance": Method("ours, λinv = 0", options={"lambda_invariance": 0.0}),
    **{f"stage-{s}": Method(f"ours, stage {s}", options={"stages": (s,)}) for s in (1, 2, 3)},
}
