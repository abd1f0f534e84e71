"""Small folders in every BraTS layout, with the original affine, orientation and labels."""

from pathlib import Path

import nibabel as nib
import numpy as np

LAYOUTS = ("2019", "2020", "2021", "2023", "MSD")
SHAPE = (26, 24, 19)
AFFINE = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # BraTS is stored in LPS orientation
NAMES_2023 = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}


def make_case(index: int, shape=SHAPE, labels=(1, 2, 4)) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Four modalities (int16, 0 outside the brain) and a mask with nested labels; the tumour is bright in FLAIR."""
    rng = np.random.default_rng(index)
    axes = np.indices(shape) - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2
    radius = np.sqrt(((axes / (np.array(shape).reshape(3, 1, 1, 1) * 0.42)) ** 2).sum(axis=0))
    brain = radius < 1
    centre = rng.uniform(-3, 3, size=3).reshape(3, 1, 1, 1)
    distance = np.sqrt(((axes - centre) ** 2).sum(axis=0))
    mask = np.zeros(shape, np.uint8)
    for reach, label in zip((5, 3.5, 2), (labels[1], labels[2], labels[0]), strict=True):
        mask[(distance < reach) & brain] = label
    images = {}
    for i, name in enumerate(("flair", "t1", "t1ce", "t2")):
        tissue = 300 + 60 * i + 40 * rng.standard_normal(shape)
        images[name] = (brain * np.clip(tissue + 400 * (mask > 0) * (i != 1), 1, None)).astype(np.int16)
    return images, mask


def make_brats(root: Path, layout: str, count: int = 6, shape=SHAPE) -> Path:
    """Write cases in a layout, nested as in the unpacked archives; returns the root folder."""
    labels = (1, 2, 3) if layout in ("2023", "MSD") else (1, 2, 4)
    for index in range(count):
        images, mask = make_case(index, shape, labels)
        if layout == "MSD":
            top = root / "Task01_BrainTumour" / "Task01_BrainTumour"
            name = f"BRATS_{index + 1:03d}.nii.gz"
            save(top / "imagesTr" / name, np.stack(list(images.values()), axis=-1))
            save(top / "labelsTr" / name, mask)
            (top / "imagesTr" / f"._{name}").write_bytes(b"Mac OS shadow")
            continue
        nested, case, join, ending = {
            "2019": (
                f"MICCAI_BraTS_2019_Data_Training/MICCAI_BraTS_2019_Data_Training/{'LGG' if index % 3 == 2 else 'HGG'}",
                f"BraTS19_CBICA_A{index:02d}_1",
                "_",
                ".nii.gz",
            ),
            "2020": ("MICCAI_BraTS2020_TrainingData", f"BraTS20_Training_{355 - index:03d}", "_", ".nii"),
            "2021": ("BraTS2021_Training_Data", f"BraTS2021_{index:05d}", "_", ".nii.gz"),
            # two time points of each patient
            "2023": ("GLI", f"BraTS-GLI-{index // 2:05d}-{index % 2:03d}", "-", ".nii.gz"),
        }[layout]
        folder = root / nested / case
        for kind, array in {**images, "seg": mask}.items():
            kind = NAMES_2023[kind] if layout == "2023" else kind
            name = f"{case}{join}{kind}{ending}"
            if case == "BraTS20_Training_355" and kind == "seg":
                name = "W39_1998.09.19_Segm.nii"
            save(folder / name, array)
    return root


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
