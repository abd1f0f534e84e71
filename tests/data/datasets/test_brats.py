"""BraTS: layouts, splits, missing or invalid files, and preprocessing."""

import re

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets import brats_volumes
from diffdiscover3d.data.datasets.brats import (
    BraTSCase,
    BraTSOptions,
    crop_box,
    find_cases,
    is_brats,
    prepare,
    read_image,
    read_mask,
    split_cases,
)
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.data.loading import has_splits, load_volumes
from diffdiscover3d.errors import InputError
from tests.helpers.brats_folders import AFFINE, LAYOUTS, SHAPE, make_brats, make_case, save

CROP = (20, 22, 19)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path, layout):
    root = make_brats(tmp_path / "data", layout)
    cases = find_cases(root)
    assert len(cases) == 6 and is_brats(root) and has_splits(str(root))
    assert {case.edition for case in cases} == {layout}
    assert [c.id for c in cases] == sorted(c.id for c in cases)
    assert {c.grade for c in cases} == ({"HGG", "LGG"} if layout == "2019" else {None})
    for case in cases:
        index = {
            "2019": lambda n: int(re.search(r"A(\d+)", n)[1]),
            "2020": lambda n: 355 - int(n[-3:]),
            "2021": lambda n: int(n[-5:]),
            "2023": lambda n: int(n[-9:-4]) * 2 + int(n[-3:]),
            "MSD": lambda n: int(n[-3:]) - 1,
        }[layout](case.id)
        images, mask = make_case(index, labels=(1, 2, 3) if layout in ("2023", "MSD") else (1, 2, 4))
        for modality, expected in images.items():
            # left becomes right and posterior becomes anterior in canonical orientation
            np.testing.assert_array_equal(read_image(case, modality).data, expected[::-1, ::-1])
        np.testing.assert_array_equal(read_mask(case, SHAPE), mask[::-1, ::-1])


def test_only_2019_has_grades(tmp_path):
    root = make_brats(tmp_path / "a", "2019")
    assert [len(find_cases(root, grade)) for grade in ("HGG", "LGG", "all")] == [4, 2, 6]
    other = make_brats(tmp_path / "b", "2021")
    assert len(find_cases(other, "LGG")) == 6


def fake_cases(count, pattern="BraTS19_{:03d}_1"):
    return [BraTSCase(pattern.format(i), "2019", {}) for i in range(count)]


def test_the_papers_numbers_and_a_stable_split():
    cases = fake_cases(259)
    split = split_cases(cases)
    assert {k: len(v) for k, v in split.items()} == {"train": 180, "validation": 39, "test": 40}
    assert sorted(c.id for side in split.values() for c in side) == [c.id for c in cases]
    shuffled = split_cases(cases[::-1])
    assert shuffled == split
    # pinned: published scores depend on who is in the test set
    assert [c.id[8:11] for c in split["test"]][:8] == PINNED
    assert split_cases(cases, seed=1)["test"] != split["test"]


PINNED = ["003", "023", "059", "061", "066", "069", "074", "076"]


@pytest.mark.parametrize(("count", "sizes"), [(3, (1, 1, 1)), (6, (4, 1, 1)), (50, (34, 8, 8)), (1, (1, 0, 0))])
def test_small_collections_are_split_too(count, sizes):
    assert tuple(len(side) for side in split_cases(fake_cases(count)).values()) == sizes


def test_time_points_of_a_patient_stay_together():
    cases = [BraTSCase(f"BraTS-GLI-{p:05d}-{t:03d}", "2023", {}) for p in range(40) for t in range(1 + p % 3)]
    sides = split_cases(cases)
    patients = [{c.patient for c in side} for side in sides.values()]
    assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
    assert sum(len(p) for p in patients) == 40 and sum(len(s) for s in sides.values()) == len(cases)


def test_case_355s_odd_mask(tmp_path):
    cases = {c.id: c for c in find_cases(make_brats(tmp_path, "2020"))}
    assert cases["BraTS20_Training_355"].mask.name == "W39_1998.09.19_Segm.nii"
    assert cases["BraTS20_Training_354"].mask.name == "BraTS20_Training_354_seg.nii"


def test_a_missing_mask_stops_scoring_but_not_training(tmp_path):
    root = make_brats(tmp_path, "2021")
    for path in root.rglob("*_seg.nii.gz"):
        path.unlink()
    options = BraTSOptions(crop=CROP)
    assert len(BraTSVolumes(root, "train", options)) == 4
    volumes = BraTSVolumes(root, "test", options)
    with pytest.raises(InputError, match=r"BraTS2021_\d+: has no mask in .*, which is required"):
        volumes.require_masks()


def test_a_missing_modality_is_named(tmp_path):
    root = make_brats(tmp_path, "2021")
    for path in root.rglob("*_t1.nii.gz"):
        path.unlink()
    with pytest.raises(InputError, match=r"BraTS2021_\d+: has no t1 file, only flair, t1ce, t2"):
        BraTSVolumes(root, "train", BraTSOptions(modality="t1", crop=CROP))


def test_wrong_shapes_are_named(tmp_path):
    root = make_brats(tmp_path, "2021", count=3)
    volumes = BraTSVolumes(root, "test", BraTSOptions())
    with pytest.raises(InputError, match=r"shape \(26, 24, 19\), smaller than the crop \(200, 200, 155\)"):
        volumes[0]
    mask = volumes.cases[0].mask
    save(mask, np.ones((5, 6, 7), np.uint8))
    with pytest.raises(InputError, match=r"_seg.nii.gz: has shape \(5, 6, 7\), the image \(26, 24, 19\)"):
        volumes.true_parts(0)
    save(mask, np.full(SHAPE, 900, np.int16))
    with pytest.raises(InputError, match="not BraTS labels"):
        volumes.true_parts(0)


def test_an_empty_mask_is_a_mask(tmp_path):
    root = make_brats(tmp_path, "2021", count=3)
    volumes = BraTSVolumes(root, "test", BraTSOptions(crop=CROP))
    save(volumes.cases[0].mask, np.zeros(SHAPE, np.uint8))
    assert set(np.unique(volumes.true_parts(0))) == {0, 1}


def test_folders_of_other_people_are_not_brats(tmp_path, make_nifti):
    data = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    make_nifti(tmp_path / "sub-01" / "sub-01_t1.nii.gz", data)
    assert not is_brats(tmp_path) and not is_brats(tmp_path / "absent")
    assert len(load_volumes(str(tmp_path))) == 1
    assert [c.edition for c in find_cases(tmp_path)] == ["unknown"]
    with pytest.raises(InputError, match="no BraTS cases"):
        find_cases(tmp_path / "sub-02")


def test_a_case_given_twice_is_refused(tmp_path):
    make_brats(tmp_path / "a", "2021", count=2)
    make_brats(tmp_path / "b", "2021", count=1)
    with pytest.raises(InputError, match="BraTS2021_00000 twice"):
        find_cases(tmp_path)


def test_preparation_against_the_formula():
    data = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.float32)
    inner = data[2:7, 1:7, 1:6]
    expected = (inner - inner.min()) / (inner.max() - inner.min())
    np.testing.assert_allclose(prepare(data, BraTSOptions(crop=(5, 6, 5))), expected, rtol=1e-6)
    low, high = np.percentile(inner[inner > 0], (2, 90))
    clipped = np.clip(inner, low, high)
    found = prepare(data, BraTSOptions(crop=(5, 6, 5), clip_percentiles=(2, 90)))
    np.testing.assert_allclose(found, (clipped - clipped.min()) / (clipped.max() - clipped.min()), atol=1e-5)
    assert prepare(data, BraTSOptions(crop=None)).shape == data.shape
    with pytest.raises(InputError, match="no contrast"):
        prepare(np.ones((9, 9, 9), np.float32), BraTSOptions(crop=(5, 5, 5)))
    assert crop_box((240, 240, 155), (200, 200, 155)) == (slice(20, 220), slice(20, 220), slice(0, 155))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"modality": "pd"}, "modality"),
        ({"grade": "hgg"}, "grade"),
        ({"crop": (5, 5)}, "crop"),
        ({"clip_percentiles": (90, 5)}, "clip_percentiles"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        BraTSOptions(**options)


def test_volumes_are_prepared_once_and_lie_on_the_whole_grid(tmp_path, monkeypatch):
    root = make_brats(tmp_path / "data", "2021")
    options = BraTSOptions(modality="t2w", crop=CROP)
    volumes = load_volumes(str(root), "test", options)
    item = volumes[0]
    assert item["volume"].shape == (1, *CROP) and item["volume"].dtype == torch.float32
    assert item["volume"].min() == 0 and item["volume"].max() == 1 and item["spacing_mm"] == [1.0, 1.0, 1.0]
    assert item["name"] == volumes.split_ids["test"][0]
    image = nib.load(volumes.cases[0].image("t2"))
    read = []
    monkeypatch.setattr(brats_volumes, "read_image", lambda *case: read.append(case))  # the cache is read instead
    again = load_volumes(str(root), "test", options)[0]
    monkeypatch.undo()
    assert read == []
    assert torch.equal(again["volume"], item["volume"]) and again["name"] == item["name"]
    other = BraTSVolumes(root, "test", BraTSOptions(modality="flair", crop=CROP))[0]
    assert not torch.equal(other["volume"], item["volume"]), "another modality is another cache"
    whole = volumes.uncrop(np.ones(CROP, np.uint8), SHAPE)
    assert whole.shape == SHAPE and whole.sum() == np.prod(CROP) and volumes.crop(whole).all()
    np.testing.assert_array_equal(image.affine, AFFINE)
