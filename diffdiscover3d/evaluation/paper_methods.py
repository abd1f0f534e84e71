"""The rows of the paper's tables: which methods there are, what labels each is given, and what was published."""

from collections.abc import Callable
from dataclasses import dataclass, field

from diffdiscover3d.errors import InputError

UNSUPERVISED, SEMI, SUPERVISED, UNTRAINED = "unsupervised", "semi-supervised", "supervised", "no training"


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        title: what the table calls it.
        baseline: makes a baseline; `None` for a network trained by a recipe. Called as
            `(num_parts, teacher, seed)`, or, if `trained`, as `(num_parts, preset=, seed=, device=)`.
        options: what a network trained by a recipe changes in the recipe.
        needs_teacher: whether it uses the diffusion model.
        as_written: take the recipe with the paper's equations instead; where there is none of this size, the recipe
            has them itself.
        trained: the baseline is a [`TrainedBaseline`].
        kind: unsupervised, semi-supervised, supervised or no training.
        labels: the amount of labels it is given, as for [`LimitedLabels`].
        needs_med3d: the baseline also takes MedicalNet features, `features=`.
        published: its name in [`PUBLISHED_DICE`] and [`PUBLISHED_BRATS`]; default: none.
    """

    title: str
    baseline: Callable | None = None
    options: dict = field(default_factory=dict)
    needs_teacher: bool = True
    as_written: bool = False
    trained: bool = False
    kind: str = UNSUPERVISED
    labels: str = "none"
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


def _aucseg(num_parts, teacher, seed):
    from diffdiscover3d.baselines.aucseg import AUCSeg

    return AUCSeg(num_parts, seed)


def _med3d_kmeans(num_parts, teacher, seed, features):
    from diffdiscover3d.baselines.med3d import Med3DKMeans

    return Med3DKMeans(num_parts, features, seed)


def _trained(module: str, name: str) -> Callable:
    """A class of `diffdiscover3d.baselines.<module>`, imported when it is called."""

    def make(num_parts, **options):
        from importlib import import_module

        return getattr(import_module(f"diffdiscover3d.baselines.{module}"), name)(num_parts, **options)

    return make


def _literature(title: str, module: str, name: str, kind: str = UNSUPERVISED, labels: str = "none", **more) -> Method:
    return Method(
        title,
        _trained(module, name),
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
    "aucseg": Method("AUCseg", _aucseg, needs_teacher=False, kind=UNTRAINED),
    **{f"features-k-means-{s}": Method(f"features k-means, stage {s}", _features(s)) for s in (1, 2, 3)},
    "features-k-means-all": Method("features k-means, all stages", _features(1, 2, 3)),
    "denoised-k-means": Method("k-means on the clean prediction", _denoised),
    "med3d-k-means": Method(
        "Med3D k-means",
        _med3d_kmeans,
        needs_teacher=False,
        kind=UNTRAINED,
        needs_med3d=True,
        published="Med3D k-means",
    ),
    "med3d": _literature("Med3D features, our losses", "med3d", "Med3DDiscovery", needs_med3d=True),
    "as-written": Method("Eq. 4 as written", as_written=True),
    "ours": Method("ours", published="ours"),
    "no-visual": Method("ours, λv = 0", options={"lambda_visual": 0.0}),
    "no-feature": Method("ours, λf = 0", options={"lambda_feature": 0.0}),
    "no-invariance": Method("ours, λinv = 0", options={"lambda_invariance": 0.0}),
    **{f"stage-{s}": Method(f"ours, stage {s}", options={"stages": (s,)}, published=f"stage {s}") for s in (1, 2, 3)},
}
_ONLY_BRATS = ("aucseg",)
TABLES: dict[int, tuple[str, ...]] = {
    1: tuple(name for name in METHODS if not name.startswith("stage-") and name not in _ONLY_BRATS),
    2: ("stage-1", "stage-2", "stage-3"),
    3: (
        "jiang",
        "nalepa",
        "iic",
        "jule",
        "hsu",
        "k-means",
        "features-k-means-2",
        "aucseg",
        "med3d-k-means",
        "med3d",
    ),
}

# Tables 1 and 2 of Tursynbek & Niethammer, MICCAI 2023: Dice at levels 1, 2 and 3, of the authors' own volumes
PUBLISHED_DICE: dict[tuple[str, str], tuple[float, float, float]] = {
    ("regular", "Çiçek et al."): (0.968, 0.829, 0.668),
    ("regular", "Zhao et al."): (0.989, 0.655, 0.357),
    ("regular", "Nalepa et al."): (0.530, 0.276, 0.112),
    ("regular", "Ji et al. (IIC)"): (0.589, 0.291, 0.150),
    ("regular", "Moriya et al. (JULE)"): (0.628, 0.311, 0.141),
    ("regular", "Hsu et al."): (0.952, 0.541, 0.216),
    ("regular", "k-means"): (0.808, 0.326, 0.149),
    ("regular", "BM4D + k-means"): (0.949, 0.529, 0.335),
    ("regular", "ours"): (0.986, 0.577, 0.397),
    ("regular", "stage 1"): (0.986, 0.366, 0.273),
    ("regular", "stage 2"): (0.923, 0.577, 0.327),
    ("regular", "stage 3"): (0.878, 0.489, 0.397),
    ("irregular", "Çiçek et al."): (0.970, 0.825, 0.601),
    ("irregular", "Zhao et al."): (0.978, 0.641, 0.333),
    ("irregular", "Nalepa et al."): (0.527, 0.280, 0.144),
    ("irregular", "Ji et al. (IIC)"): (0.527, 0.280, 0.144),
    ("irregular", "Moriya et al. (JULE)"): (0.525, 0.232, 0.094),
    ("irregular", "Hsu et al."): (0.953, 0.488, 0.199),
    ("irregular", "k-means"): (0.771, 0.299, 0.118),
    ("irregular", "BM4D + k-means"): (0.950, 0.533, 0.324),
    ("irregular", "ours"): (0.967, 0.565, 0.382),
}
# Table 3: Dice and HD95 (mm) of the whole tumour, BraTS'19; AUCseg: Dice reported by its authors on BraTS'18
PUBLISHED_BRATS: dict[str, tuple[float, float | None]] = {
    "Jiang et al.": (0.888, 4.618),
    "Nalepa et al.": (0.211, 170.434),
    "Ji et al. (IIC)": (0.425, 114.400),
    "Moriya et al. (JULE)": (0.495, 110.803),
    "Hsu et al.": (0.684, 97.641),
    "ours": (0.719, 27.838),
    "ours, λinv = 0": (0.696, 38.645),
    "ours, λf = 0": (0.677, 42.318),
    "ours, λv = 0": (0.671, 41.801),
    "Med3D features, our losses": (0.657, 29.906),
    "k-means": (0.439, 63.811),
    "features k-means, stage 2": (0.471, 45.917),
    "Med3D k-means": (0.231, 55.846),
    "AUCseg": (0.82, None),
}


def published_dice(method: str, variant: str, level: int) -> float | None:
    """The published Dice of a method at a level, or `None` if there is none."""
    found = PUBLISHED_DICE.get((variant, METHODS[method].published or ""))
    return None if found is None else found[level - 1]


def published_brats(title: str) -> tuple[float, float | None] | None:
    """The published Dice and HD95 of a row of table 3, or `None` if there are none."""
    return PUBLISHED_BRATS.get(title)


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
