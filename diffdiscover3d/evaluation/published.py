"""Published scores of the rows of the paper's tables."""

from diffdiscover3d.evaluation.methods import METHODS

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
