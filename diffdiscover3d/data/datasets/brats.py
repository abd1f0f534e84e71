"""BraTS in all released layouts: discovery of cases, splits and preprocessing.

| set | path | labels |
| --- | --- | --- |
| 2017 to 2019 | `{HGG,LGG}/<id>/<id>_{flair,t1,t1ce,t2,seg}.nii.gz` | 1, 2, 4 |
| 2020 | `BraTS20_Training_001/BraTS20_Training_001_flair.nii[.gz]` | 1, 2, 4 |
| 2021 | `BraTS2021_00000/BraTS2021_00000_flair.nii.gz` | 1, 2, 4 |
| 2023 | `BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz` | 1, 2, 3 |
| MSD Task01 | `imagesTr/BRATS_001.nii.gz`, 4-D (FLAIR, T1, T1ce, T2), `labelsTr/BRATS_001.nii.gz` | 1, 2, 3 |

The layout is detected automatically, at any depth of the folder. The whole tumour comprises all labels above 0.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, read_nifti
from diffdiscover3d.errors import InputError, without_options

MODALITIES = ("flair", "t1", "t1ce", "t2")
SPLIT_COUNTS = {"train": 180, "validation": 39, "test": 40}  # the paper's 259 cases
_ALIASES = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2"}
_FILE = re.compile(r"(?P<id>.+)[-_](?P<kind>flair|t1|t1ce|t2|t2f|t1n|t1c|t2w|seg)\.nii(\.gz)?")
_MSD_FILE = re.compile(r"(?P<id>BRATS_\d+)\.nii\.gz")
_ODD_MASKS = ("W39_1998.09.19_Segm.nii", "W39_1998.09.19_Segm.nii.gz")  # mask of BraTS20_Training_355
_EDITIONS = {"BraTS-GLI-": "2023", "BraTS2021_": "2021", "BraTS20_": "2020"}
_TIME_POINT = re.compile(r"(BraTS-GLI-\d+)-\d+")


@dataclass(frozen=True)
class BraTSOptions:
    """Selection and preprocessing of BraTS volumes. The defaults are those of the paper.

    Attributes:
        modality: flair, t1, t1ce or t2, or the names of BraTS 2023: t2f, t1n, t1c, t2w.
        grade: "HGG" or "LGG" for editions with grades (2017 to 2019), "all" for both.
        crop: size of the central crop, in voxels; `None` disables cropping.
        clip_percentiles: percentiles of the voxels above 0 to which intensities are clipped before min-max
            normalisation; `None`, as in the paper, disables clipping.
        split_seed: random seed of the training, validation and test splits.
    """

    modality: str = "flair"
    grade: str = "HGG"
    crop: tuple[int, int, int] | None = (200, 200, 155)
    clip_percentiles: tuple[float, float] | None = None
    split_seed: int = 0

    def __post_init__(self):
        modality = _ALIASES.get(self.modality.lower(), self.modality.lower())
        object.__setattr__(self, "modality", modality)
        if modality not in MODALITIES:
            raise ValueError(f"`modality` must be one of {MODALITIES}, got {self.modality!r}.")
        if self.grade not in ("HGG", "LGG", "all"):
            raise ValueError(f"`grade` must be HGG, LGG or all, got {self.grade!r}.")
        if self.crop is not None:
            crop = tuple(int(n) for n in self.crop)
            object.__setattr__(self, "crop", crop)
            if len(crop) != 3 or min(crop) < 2:
                raise ValueError(f"`crop` must be three integers of at least 2, got {self.crop}.")
        if self.clip_percentiles is not None:
            low, high = self.clip_percentiles
            object.__setattr__(self, "clip_percentiles", (float(low), float(high)))
            if not 0 <= low < high <= 100:
                raise ValueError(f"`clip_percentiles` must be ascending within 0..100, got {self.clip_percentiles}.")


@dataclass(frozen=True)
class BraTSCase:
    """One subject at one time point.

    Attributes:
        id: name of the case.
        edition: "2019" (also for 2017 and 2018), "2020", "2021", "2023", "MSD" or "unknown".
        images: path of the file of each modality; for MSD the same 4-D file for all.
        mask: path of the tumour labels; `None` if missing.
        grade: "HGG" or "LGG" for editions with grades, otherwise `None`.
    """

    id: str
    edition: str
    images: dict[str, Path] = field(hash=False)
    mask: Path | None = None
    grade: str | None = None

    @property
    def patient(self) -> str:
        """The id without the time point; BraTS 2023 has several time points per patient."""
        match = _TIME_POINT.fullmatch(self.id)
        return match[1] if match else self.id

    def image(self, modality: str) -> Path:
        """The path of the file of a modality.

        Raises:
            InputError: if it is missing.
        """
        if modality not in self.images:
            raise InputError(
                f"{self.id}: has no {modality} file, only {', '.join(sorted(self.images)) or 'a mask'}; "
                "download the case again (removing it would change the split)."
            )
        return self.images[modality]

    def require_mask(self) -> Path:
        """The path of the tumour labels.

        Raises:
            InputError: if it is missing.
        """
        if self.mask is None:
            folder = next(iter(self.images.values())).parent
            raise InputError(
                f"{self.id}: has no mask in {folder} (…seg.nii.gz), which is required for evaluation. Validation sets "
                "have no masks: use the training set. Removing the case would change the split."
            )
        return self.mask


def find_cases(root: str | Path, grade: str = "all") -> list[BraTSCase]:
    """Find all cases under a folder, sorted by id.

    Args:
        root: folder that contains the cases at any depth, in any of the layouts.
        grade: "HGG" or "LGG" to keep only that grade, for editions with grades; "all" for both.

    Raises:
        InputError: if there are no cases, or an id occurs twice.
    """
    root = Path(root)
    found = _scan(root)
    if grade != "all" and any(case.grade for case in found):
        found = [case for case in found if case.grade == grade]
    if not found:
        raise InputError(
            f"{root}: no BraTS cases{'' if grade == 'all' else f' of grade {grade}'}; give the unpacked folder of "
            "BraTS 2017 to 2021, 2023, or of MSD Task01_BrainTumour."
        )
    found.sort(key=lambda case: case.id)
    for one, two in itertools.pairwise(found):
        if one.id == two.id:
            places = " and ".join(str(next(iter(c.images.values())).parent) for c in (one, two))
            raise InputError(f"{root}: contains {one.id} twice, in {places}; give one of the folders.")
    return found


def is_brats(root: str | Path) -> bool:
    """Whether a folder contains cases of a known BraTS edition, judged by file and folder names."""
    root = Path(root)
    return root.is_dir() and any(_edition(path) != "unknown" for path, _ in _case_files(root))


def split_cases(cases: Sequence[BraTSCase], seed: int = 0) -> dict[str, list[BraTSCase]]:
    """Split cases into training, validation and test sets, 180 : 39 : 40, by patient.

    The split of the paper was not released. This one sorts the patients, shuffles them with the seed and assigns them
    in order, so it depends only on the ids and the seed.
    """
    patients: dict[str, list[BraTSCase]] = {}
    for case in sorted(cases, key=lambda c: c.id):
        patients.setdefault(case.patient, []).append(case)
    order = sorted(patients)
    rng = random.Random(seed)
    for last in range(len(order) - 1, 0, -1):  # `random()` is stable across Python versions, `shuffle()` is not
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    total, count = sum(SPLIT_COUNTS.values()), len(order)
    validation = round(count * SPLIT_COUNTS["validation"] / total)
    test = round(count * SPLIT_COUNTS["test"] / total)
    if count >= 3:  # every split of a small collection gets a patient
        validation, test = max(1, validation), max(1, test)
    train = count - validation - test
    splits = {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": order[train + validation :],
    }
    return {name: sorted((c for p in side for c in patients[p]), key=lambda c: c.id) for name, side in splits.items()}


def read_image(case: BraTSCase, modality: str) -> NiftiVolume:
    """Read the volume of a modality in canonical orientation.

    Raises:
        InputError: if the file is missing or damaged.
    """
    channel = MODALITIES.index(modality) if case.edition == "MSD" else None
    try:
        return read_nifti(case.image(modality), volume=channel)
    except InputError as error:
        if (problem := without_options(str(error))) == str(error):
            raise
        # the options for unusual files are not for published data sets
        raise InputError(f"{problem}; download the case again.") from error


def read_mask(case: BraTSCase, shape: Sequence[int]) -> np.ndarray:
    """Read the tumour labels as (H, W, D) uint8 in canonical orientation.

    Raises:
        InputError: if there is no mask, its shape differs from `shape`, or it contains values that are not labels.
    """
    path = case.require_mask()
    data = read_nifti(path, allow_constant=True).data
    if data.shape != tuple(shape):
        raise InputError(
            f"{path}: has shape {data.shape}, the image {tuple(shape)}; they must be equal. Download the case again."
        )
    values = np.unique(data)
    if not set(values.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}:
        raise InputError(
            f"{path}: contains {values[:6].tolist()}, which are not BraTS labels (0 to 4); check the file."
        )
    return data.astype(np.uint8)


def prepare(data: np.ndarray, options: BraTSOptions, name: str = "volume") -> np.ndarray:
    """Crop, optionally clip, and min-max normalise a volume: (h, w, d) float32 in [0, 1].

    Raises:
        InputError: if the volume is smaller than the crop, or constant within the crop.
    """
    data = data[crop_box(data.shape, options.crop, name)]
    if options.clip_percentiles is not None:
        tissue = data[data > 0]
        if tissue.size:
            data = np.clip(data, *np.percentile(tissue, options.clip_percentiles).astype(np.float32))
    low, high = float(data.min()), float(data.max())
    if high <= low:
        raise InputError(f"{name}: no contrast within the crop {options.crop}; check the file.")
    return ((data - low) / (high - low)).astype(np.float32)


def true_parts(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The three reference parts as uint8: 0 background (intensity 0), 1 brain, 2 whole tumour."""
    return np.where(mask > 0, 2, image != 0).astype(np.uint8)


def crop_box(shape: Sequence[int], crop: Sequence[int] | None, name: str = "volume") -> tuple[slice, ...]:
    """Slices of the central crop of a volume; without a crop those of the whole volume.

    Raises:
        InputError: if the volume is smaller than the crop along an axis.

    >>> crop_box((240, 240, 155), (200, 200, 155))
    (slice(20, 220, None), slice(20, 220, None), slice(0, 155, None))
    """
    if crop is None:
        return tuple(slice(0, n) for n in shape)
    if any(n < c for n, c in zip(shape, crop, strict=True)):
        raise InputError(
            f"{name}: of shape {tuple(shape)}, smaller than the crop {tuple(crop)}; choose a smaller crop."
        )
    return tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(shape, crop, strict=True))


def _case_files(root: Path):
    """Yield the files of all cases with the match of their name; files of MSD only below imagesTr."""
    for path in root.rglob("*.nii*"):
        if path.name.startswith("."):  # archives created on macOS contain AppleDouble files
            continue
        if (path.parent.name == "imagesTr" and (match := _MSD_FILE.fullmatch(path.name))) or (
            (match := _FILE.fullmatch(path.name)) and match["id"] == path.parent.name
        ):
            yield path, match


def _edition(path: Path) -> str:
    """The edition of a file, from its folders and its name."""
    if path.parent.name == "imagesTr":
        return "MSD"
    known = next((e for start, e in _EDITIONS.items() if path.name.startswith(start)), None)
    return known or ("2019" if path.parent.parent.name in ("HGG", "LGG") else "unknown")


def _scan(root: Path) -> list[BraTSCase]:
    folders: dict[Path, dict[str, Path]] = {}
    found = []
    for path, match in _case_files(root):
        if path.parent.name == "imagesTr":
            mask = path.parent.parent / "labelsTr" / path.name
            images = dict.fromkeys(MODALITIES, path)
            found.append(BraTSCase(match["id"], "MSD", images, mask if mask.is_file() else None))
        else:
            kind = _ALIASES.get(match["kind"], match["kind"])
            folders.setdefault(path.parent, {})[kind] = path
    for folder, files in folders.items():
        mask = files.pop("seg", None)
        if mask is None:
            mask = next((folder / name for name in _ODD_MASKS if (folder / name).is_file()), None)
        grade = folder.parent.name if folder.parent.name in ("HGG", "LGG") else None
        if files:
            edition = _edition(next(iter(files.values())))
            found.append(BraTSCase(folder.name, edition, files, mask, grade))
    return found
