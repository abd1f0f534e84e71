"""BraTS in every layout it was released in: which cases there are, how they are split, how a volume is prepared.

| set | path | labels |
| --- | --- | --- |
| 2017 to 2019 | `{HGG,LGG}/<id>/<id>_{flair,t1,t1ce,t2,seg}.nii.gz` | 1, 2, 4 |
| 2020 | `BraTS20_Training_001/BraTS20_Training_001_flair.nii[.gz]` | 1, 2, 4 |
| 2021 | `BraTS2021_00000/BraTS2021_00000_flair.nii.gz` | 1, 2, 4 |
| 2023 | `BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz` | 1, 2, 3 |
| MSD Task01 | `imagesTr/BRATS_001.nii.gz`, 4-D (FLAIR, T1, T1ce, T2), `labelsTr/BRATS_001.nii.gz` | 1, 2, 3 |

They are recognised by themselves, however deep the folder is nested. The whole tumour is every label above 0.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, read_nifti
from diffdiscover3d.errors import InputError

MODALITIES = ("flair", "t1", "t1ce", "t2")
SPLIT_COUNTS = {"train": 180, "validation": 39, "test": 40}  # of the paper's 259 cases
_ALIASES = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2"}
_FILE = re.compile(r"(?P<id>.+)[-_](?P<kind>flair|t1|t1ce|t2|t2f|t1n|t1c|t2w|seg)\.nii(\.gz)?")
_MSD_FILE = re.compile(r"(?P<id>BRATS_\d+)\.nii\.gz")
_ODD_MASKS = ("W39_1998.09.19_Segm.nii", "W39_1998.09.19_Segm.nii.gz")  # of BraTS20_Training_355
_EDITIONS = {"BraTS-GLI-": "2023", "BraTS2021_": "2021", "BraTS20_": "2020"}
_TIME_POINT = re.compile(r"(BraTS-GLI-\d+)-\d+")


@dataclass(frozen=True)
class BraTSOptions:
    """How BraTS volumes are chosen and prepared; the defaults are the paper's.

    Attributes:
        modality: flair, t1, t1ce or t2 (or the names of 2023: t2f, t1n, t1c, t2w).
        grade: "HGG" or "LGG" where the edition tells them apart (2017 to 2019), "all" for both.
        crop: the central box volumes are cropped to, in voxels; `None` for whole volumes.
        clip_percentiles: intensities are clipped to these percentiles of the voxels above 0 before they are
            min-max normalised; `None`, as in the paper: not at all.
        split_seed: of the division into training, validation and test cases.
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
    """One subject at one time point: its files by modality, its mask if there is one.

    Attributes:
        id: the case's name in its edition.
        edition: "2019" (and its like of 2017 and 2018), "2020", "2021", "2023", "MSD" or "unknown".
        grade: "HGG" or "LGG" where the folders say so.
        images: the file of each modality; of MSD the same 4-D file for all.
        mask: the file of tumour labels; `None` if it is missing.
    """

    id: str
    edition: str
    images: dict[str, Path] = field(hash=False)
    mask: Path | None = None
    grade: str | None = None

    @property
    def patient(self) -> str:
        """The id without the time point, of which 2023 has several a patient."""
        match = _TIME_POINT.fullmatch(self.id)
        return match[1] if match else self.id

    def image(self, modality: str) -> Path:
        """The file of a modality.

        Raises:
            InputError: if the case lacks it.
        """
        if modality not in self.images:
            raise InputError(
                f"{self.id}: has no {modality} file, only {', '.join(sorted(self.images)) or 'a mask'}; "
                "download the case again (without it the split would be another one)."
            )
        return self.images[modality]

    def require_mask(self) -> Path:
        """The file of labels.

        Raises:
            InputError: if the case lacks it.
        """
        if self.mask is None:
            folder = next(iter(self.images.values())).parent
            raise InputError(
                f"{self.id}: has no mask in {folder} (…seg.nii.gz); scores need one. Validation sets come without: "
                "use the training set; without the case the split would be another one."
            )
        return self.mask


def find_cases(root: str | Path, grade: str = "all") -> list[BraTSCase]:
    """All cases under a folder, sorted by id.

    Args:
        root: any folder at or above the cases, in any of the layouts.
        grade: keep only "HGG" or "LGG", where the edition tells them apart.

    Raises:
        InputError: if there is no case, or an id occurs twice.
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
            raise InputError(f"{root}: holds {one.id} twice, in {places}; give one of the folders.")
    return found


def is_brats(root: str | Path) -> bool:
    """Whether a folder holds cases of a known edition; others, named alike, may be anybody's scans."""
    root = Path(root)
    return root.is_dir() and any(_edition(path) != "unknown" for path, _ in _case_files(root))


def split_cases(cases: Sequence[BraTSCase], seed: int = 0) -> dict[str, list[BraTSCase]]:
    """Divide cases into training, validation and test, 180 : 39 : 40, all time points of a patient on one side.

    The published split was never released. This one sorts the patients, shuffles them with the seed and deals them
    out, so it depends on the ids and the seed alone.
    """
    patients: dict[str, list[BraTSCase]] = {}
    for case in sorted(cases, key=lambda c: c.id):
        patients.setdefault(case.patient, []).append(case)
    order = sorted(patients)
    rng = random.Random(seed)
    for last in range(len(order) - 1, 0, -1):  # Python keeps the bits of `random()`, but not those of `shuffle()`
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    total, count = sum(SPLIT_COUNTS.values()), len(order)
    validation = round(count * SPLIT_COUNTS["validation"] / total)
    test = round(count * SPLIT_COUNTS["test"] / total)
    if count >= 3:  # small collections: every side gets a patient
        validation, test = max(1, validation), max(1, test)
    train = count - validation - test
    sides = {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": order[train + validation :],
    }
    return {name: sorted((c for p in side for c in patients[p]), key=lambda c: c.id) for name, side in sides.items()}


def read_image(case: BraTSCase, modality: str) -> NiftiVolume:
    """The volume of a modality, in canonical orientation.

    Raises:
        InputError: if the file is missing or damaged.
    """
    channel = MODALITIES.index(modality) if case.edition == "MSD" else None
    return read_nifti(case.image(modality), volume=channel)


def read_mask(case: BraTSCase, shape: Sequence[int]) -> np.ndarray:
    """The tumour labels as (H, W, D) uint8, in canonical orientation.

    Raises:
        InputError: if there is no mask, it has another shape than `shape`, or holds something else than labels.
    """
    path = case.require_mask()
    data = read_nifti(path, allow_constant=True).data
    if data.shape != tuple(shape):
        raise InputError(
            f"{path}: has shape {data.shape}, the image {tuple(shape)}; they must be of one grid. "
            "Download the case again."
        )
    values = np.unique(data)
    if not set(values.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}:
        raise InputError(f"{path}: holds {values[:6].tolist()}, which are no BraTS labels (0 to 4); is it the mask?")
    return data.astype(np.uint8)


def prepare(data: np.ndarray, options: BraTSOptions, name: str = "volume") -> np.ndarray:
    """Crop, clip if asked for, and min-max normalise a volume: (h, w, d) float32 in [0, 1].

    Raises:
        InputError: if the volume is smaller than the crop, or nothing but one value is left.
    """
    data = data[crop_box(data.shape, options.crop, name)]
    if options.clip_percentiles is not None:
        tissue = data[data > 0]
        if tissue.size:
            data = np.clip(data, *np.percentile(tissue, options.clip_percentiles).astype(np.float32))
    low, high = float(data.min()), float(data.max())
    if high <= low:
        raise InputError(f"{name}: no contrast within the crop {options.crop}; is it the right file?")
    return ((data - low) / (high - low)).astype(np.float32)


def true_parts(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The three parts to be found, as uint8: 0 outside (intensity 0), 1 brain, 2 whole tumour."""
    return np.where(mask > 0, 2, image != 0).astype(np.uint8)


def crop_box(shape: Sequence[int], crop: Sequence[int] | None, name: str = "volume") -> tuple[slice, ...]:
    """Slices of the central box of a volume.

    >>> crop_box((240, 240, 155), (200, 200, 155))
    (slice(20, 220, None), slice(20, 220, None), slice(0, 155, None))
    """
    if crop is None:
        return tuple(slice(0, n) for n in shape)
    if any(n < c for n, c in zip(shape, crop, strict=True)):
        raise InputError(f"{name}: of shape {tuple(shape)}, smaller than the crop {tuple(crop)}; choose a smaller one.")
    return tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(shape, crop, strict=True))


def _case_files(root: Path):
    """Files that belong to a case, with the match of their name; those of MSD only below imagesTr."""
    for path in root.rglob("*.nii*"):
        if path.name.startswith("."):  # archives made on a Mac hold shadows of every file
            continue
        if (path.parent.name == "imagesTr" and (match := _MSD_FILE.fullmatch(path.name))) or (
            (match := _FILE.fullmatch(path.name)) and match["id"] == path.parent.name
        ):
            yield path, match


def _edition(path: Path) -> str:
    """The edition a case's file belongs to, by its folders and its name."""
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
