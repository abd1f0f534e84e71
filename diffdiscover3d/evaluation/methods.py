"""The rows of the tables: baselines, the method and its ablations, and a supervised ceiling."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module

from diffdiscover3d.errors import InputError

UNSUPERVISED, SEMI, SUPERVISED, UNTRAINED = "unsupervised", "semi-supervised", "supervised", "no training"


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        title: what the table calls it.
        baseline: makes a baseline; `None` for a network trained by a recipe. Called as `(num_parts, teacher, seed)`,
            or, if `trained`, as `(num_parts, preset=, seed=, device=)`.
        options: what a trained network changes in the recipe.
        recipe: take another recipe of the same size, the one with this ending, such as the paper's equations
            as written.
        labels: the amount of labels it is given, as for [`LimitedLabels`].
        kind: unsupervised, semi-supervised, supervised or no training.
        trained: the baseline is a [`TrainedBaseline`].
        needs_med3d: the baseline also takes MedicalNet features, `features=`.
        published: its name in [`PUBLISHED_DICE`]; default: none.
    """

    title: str
    baseline: Callable | None = None
    options: dict = field(default_factory=dict)
    needs_teacher: bool = True
    recipe: str = ""
    labels: str = "none"
    kind: str = UNSUPERVISED
    trained: bool = False
    needs_med3d: bool = False
    published: str | None = None


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


def _aucseg(num_parts, teacher, seed):
    from diffdiscover3d.baselines.aucseg import AUCSeg

    return AUCSeg(num_parts, seed)


def _med3d_kmeans(num_parts, teacher, seed, features):
    from diffdiscover3d.baselines.med3d import Med3DKMeans

    return Med3DKMeans(num_parts, features, seed)


@dataclass(frozen=True)
class _Trained:
    """A [`TrainedBaseline`] of `diffdiscover3d.baselines.<module>`, imported when it is used."""

    module: str
    name: str

    def __call__(self, num_parts: int, **options):
        return self._load()(num_parts, **options)

    def hyper_parameters(self, preset: str) -> dict:
        """The fields of a preset, as JSON values."""
        fields = asdict(self._load().presets[preset])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def _load(self) -> type:
        return getattr(import_module(f"diffdiscover3d.baselines.{self.module}"), self.name)


def _literature(title: str, module: str, name: str, kind: str = UNSUPERVISED, labels: str = "none", **more) -> Method:
    return Method(
        title,
        _Trained(module, name),
        needs_teacher=False,
        trained=True,
        kind=kind,
        labels=labels,
        published=title,
        **more,
    )


METHODS: dict[str, Method] = {
    "cicek": _literature("Çiçek et al.", "cicek", "Cicek", SEMI, "slice"),
    "zhao": _literature("Zhao et al.", "zhao", "Zhao", SEMI, "volume"),
    "jiang": _literature("Jiang et al.", "jiang", "Jiang", SUPERVISED, "all"),
    "nalepa": _literature("Nalepa et al.", "nalepa", "Nalepa"),
    "iic": _literature("Ji et al. (IIC)", "iic", "IIC"),
    "jule": _literature("Moriya et al. (JULE)", "jule", "Jule"),
    "hsu": _literature("Hsu et al.", "hsu", "Hsu"),
    "k-means": Method("k-means", _kmeans, needs_teacher=False, kind=UNTRAINED, published="k-means"),
    "bm4d-k-means": Method("BM4D + k-means", _bm4d, needs_teacher=False, kind=UNTRAINED, published="BM4D + k-means"),
    **{f"features-k-means-{s}": Method(f"features k-means, stage {s}", _features(s)) for s in (1, 2, 3)},
    "features-k-means-all": Method("features k-means, all stages", _features(1, 2, 3)),
    "spatial-k-means": Method("k-means in space, no training", _spatial),
    "denoised-k-means": Method("k-means on the clean prediction", _denoised),
    "aucseg": Method("AUCseg", _aucseg, needs_teacher=False, kind=UNTRAINED),
    "med3d-k-means": Method("Med3D k-means", _med3d_kmeans, needs_teacher=False, kind=UNTRAINED, needs_med3d=True),
    "med3d": _literature("Med3D features, our losses", "med3d", "Med3DDiscovery", needs_med3d=True),
    "as-written": Method("Eq. 4 as written", recipe="as-written"),
    "ours": Method("ours", published="ours"),
    "consistency": Method("consistencies alone", recipe="consistency"),
    "first-round": Method("ours, one round of assignments", recipe="first-round"),
    "no-space": Method("ours, no space in the assignments", options={"inclusions": "alike"}),
    "no-smooth": Method("ours, no Potts model in the assignments", options={"potts_strength": 0.0}),
    "no-recolor": Method("ours, no new intensities", options={"recolor_probability": 0.0}),
    "supervised": Method("our network trained on all labels", recipe="supervised", labels="all", kind=SUPERVISED),
    "no-visual": Method("consistencies alone, λv = 0", options={"lambda_visual": 0.0}, recipe="consistency"),
    "no-feature": Method("consistencies alone, λf = 0", options={"lambda_feature": 0.0}, recipe="consistency"),
    "no-invariance": Method("consistencies alone, λinv = 0", options={"lambda_invariance": 0.0}, recipe="consistency"),
    **{
        f"stage-{s}": Method(
            f"consistencies alone, stage {s}", options={"stages": (s,)}, recipe="consistency", published=f"stage {s}"
        )
        for s in (1, 2, 3)
    },
}


def preset_of(recipe: str) -> str:
    """The preset of baselines that goes with a recipe."""
    return "paper" if recipe == "paper" else "small"


def make_baseline(
    method: Method,
    num_parts: int,
    seed: int,
    teacher=None,
    preset: str = "small",
    device: str = "cpu",
    med3d: str | None = None,
):
    """The baseline of a method that is not trained by a recipe.

    Raises:
        InputError: if the method needs MedicalNet's weights and none are given.
    """
    more = {}
    if method.needs_med3d:
        if med3d is None:
            raise InputError(f"{method.title}: needs MedicalNet's weights; give a file or Hub id.")
        from diffdiscover3d.baselines.med3d import load_med3d

        more["features"] = load_med3d(med3d, seed)
    if method.trained:
        return method.baseline(num_parts, preset=preset, seed=seed, device=device, **more)
    return method.baseline(num_parts, teacher, seed, **more)
