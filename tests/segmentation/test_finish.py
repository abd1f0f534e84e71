"""Masks, smoothing, small pieces, backgrounds; a label map's own name; levels by their number of parts."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import InputError, OutputError
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.finish import (
    Finish,
    bounding_box,
    numbers_with_background,
    read_mask,
    smoothed,
    without_small_pieces,
)

SHAPE = (20, 22, 18)


@pytest.fixture
def scan(tmp_path, make_nifti):
    values = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
    values[5:15, 6:16, 4:14] += 200
    return make_nifti(tmp_path / "in" / "scan.nii.gz", values, np.diag([-1.5, 2, 3, 1]))


def load(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_small_pieces_take_the_number_around_them():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[:, :, 5:] = 1
    expected = labels.copy()
    labels[1, 1, 1] = 2  # alone within part 0
    labels[7, 7, 7:9] = 0  # two voxels within part 1
    found = without_small_pieces(labels, 3, 3)
    assert np.array_equal(found, expected) and found.dtype == labels.dtype
    assert np.array_equal(without_small_pieces(labels, 2, 3)[7, 7, 7:9], [0, 0])
    assert np.array_equal(without_small_pieces(labels, 10_000, 3), labels)  # all are small


def test_small_pieces_stay_in_their_parent():
    """On a random map: the nearest voxel of a larger piece of the same parent, by comparing all distances."""
    rng = np.random.default_rng(5)
    parents = np.zeros((9, 7, 8), np.uint8)
    parents[5:] = 1
    parents[:, :, 7] = 2
    labels = (2 * parents + (rng.random(parents.shape) < 0.3)).astype(np.uint8)
    labels[:, :, 7] = 4 + np.indices((9, 7)).sum(axis=0) % 2  # a chessboard: small pieces only
    found = without_small_pieces(labels, 6, 6, parents)
    assert np.array_equal(found // 2, parents) and (found != labels).any()
    assert np.array_equal(found[:, :, 7], labels[:, :, 7])
    small = np.zeros(labels.shape, bool)
    for part in range(6):
        pieces, count = ndimage.label(labels == part)
        for piece in range(1, count + 1):
            small |= (pieces == piece) & ((pieces == piece).sum() < 6)
    for place in np.argwhere(small & (parents < 2)):
        others = np.argwhere(~small & (parents == parents[tuple(place)]))
        distances = ((others - place) ** 2).sum(axis=1)
        nearest = {int(labels[tuple(o)]) for o in others[distances == distances.min()]}
        assert int(found[tuple(place)]) in nearest
    assert np.array_equal(found[~small], labels[~small])


def test_smoothing_keeps_probabilities():
    soft = np.random.default_rng(0).dirichlet([1, 1, 1], SHAPE).transpose(3, 0, 1, 2)
    found = smoothed(soft, 1.5)
    assert np.allclose(found.sum(axis=0), 1) and found.std() < soft.std() / 3


def test_boxes_of_masks():
    mask = np.zeros((40, 30, 10), bool)
    mask[5:35, 12, 3] = True
    assert bounding_box(mask) == (slice(5, 35), slice(5, 21), slice(0, 10))
    mask[:] = False
    mask[39, 29, 9] = mask[38, 28, 9] = True
    box = bounding_box(mask)
    assert [s.stop - s.start for s in box] == [16, 16, 10] and mask[box].sum() == 2


def test_numbers_with_a_background():
    assert numbers_with_background([3, 1, 0, 2], 2).tolist() == [0, 3, 1, 2]
    with pytest.raises(ValueError, match="from 0 to 3"):
        numbers_with_background([3, 1, 0, 2], 4)
    with pytest.raises(ValueError, match="mask"):
        Finish(mask="a.nii", background=1)


def test_a_background_is_0_and_named(scan, tmp_path, tiny_discovery):
    segment(scan, tmp_path / "plain", model=str(tiny_discovery))
    segment(scan, tmp_path / "out", model=str(tiny_discovery), background=2, tables=True)
    plain, found = (load(tmp_path / f / "scan_dseg.nii.gz") for f in ("plain", "out"))
    assert np.array_equal(found, np.array([1, 2, 0])[plain])
    rows = list(csv.DictReader((tmp_path / "out" / "scan_dseg.tsv").read_text().splitlines(), delimiter="\t"))
    assert [row["name"] for row in rows] == ["background", "part 1", "part 2"]
    assert [int(row["voxels"]) for row in rows] == np.bincount(found.ravel(), minlength=3).tolist()
    sidecar = json.loads((tmp_path / "out" / "scan_dseg.json").read_text())
    assert sidecar["background"] == sidecar["arguments"]["background"] == 2
    assert '"background"' in (tmp_path / "out" / "scan_dseg.label").read_text()


def test_a_mask_limits_the_work(scan, tmp_path, tiny_discovery, make_nifti):
    affine = np.diag([-1.5, 2, 3, 1])
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:18, 3:20, 1:17] = 1
    path = make_nifti(tmp_path / "mask.nii.gz", mask, affine)
    segment(scan, tmp_path / "out", model=str(tiny_discovery), mask=path)
    found = load(tmp_path / "out" / "scan_dseg.nii.gz")
    assert not found[mask == 0].any() and (found[mask == 1] > 0).all() and found.max() <= 3
    # what is outside has no influence: the same from a scan that is cut to the mask by hand
    values = load(scan).copy()
    values[mask == 0] = values[mask == 1].min()
    cut = make_nifti(tmp_path / "cut.nii.gz", values[2:18, 3:20, 1:17], affine)
    segment(cut, tmp_path / "cut", model=str(tiny_discovery))
    assert np.array_equal(found[2:18, 3:20, 1:17], load(tmp_path / "cut" / "cut_dseg.nii.gz") + 1)
    rows = list(csv.DictReader((tmp_path / "out" / "scan_dseg.tsv").read_text().splitlines(), delimiter="\t"))
    assert [row["name"] for row in rows] == ["outside the mask", "part 1", "part 2", "part 3"]
    for wrong, word in (
        (make_nifti(tmp_path / "w.nii.gz", mask[:-1], affine), "shape"),
        (make_nifti(tmp_path / "e.nii.gz", mask * 0, affine), "marks no voxel"),
        (make_nifti(tmp_path / "t.nii.gz", mask, np.diag([1.5, 2, 4, 1])), "size or direction"),
    ):
        with pytest.raises(InputError, match=word):
            segment(scan, tmp_path / "no", model=str(tiny_discovery), mask=wrong)
    assert not (tmp_path / "no").exists()


def test_smoothing_and_small_pieces_are_recorded(scan, tmp_path, tiny_discovery):
    segment(scan, tmp_path / "plain", model=str(tiny_discovery), statistics=True)
    segment(scan, tmp_path / "out", model=str(tiny_discovery), statistics=True, smooth=1, min_size=8)
    count = {}
    for folder in ("plain", "out"):
        table = (tmp_path / folder / "scan_dseg.tsv").read_text().splitlines()
        count[folder] = sum(int(row["components"]) for row in csv.DictReader(table, delimiter="\t"))
    assert count["out"] < count["plain"] / 2
    arguments = json.loads((tmp_path / "out" / "scan_dseg.json").read_text())["arguments"]
    assert (arguments["smooth"], arguments["min_size"]) == (1, 8)


def test_a_label_map_has_a_name_of_its_own(scan, tmp_path, tiny_discovery):
    target = tmp_path / "new" / "mine.nii.gz"
    (result,) = segment(scan, target, model=str(tiny_discovery), preview=True)
    assert result.labels == target
    assert sorted(p.name for p in target.parent.iterdir()) == ["mine.json", "mine.nii.gz", "mine.png", "mine.tsv"]
    segment(scan, tmp_path / "plain.nii", model=str(tiny_discovery))
    assert np.array_equal(load(target), load(tmp_path / "plain.nii"))
    with pytest.raises(OutputError, match="exists"):
        segment(scan, target, model=str(tiny_discovery))
    with pytest.raises(ValueError, match=r"must end in \.nii\.gz"):
        segment(scan, tmp_path / "x.tif", model=str(tiny_discovery))
    with pytest.raises(ValueError, match="one file for 2 inputs"):
        segment([scan, shutil.copy(scan, tmp_path / "other.nii.gz")], tmp_path / "x.nii.gz", model=str(tiny_discovery))


def test_a_level_by_its_number_of_parts(scan, tmp_path):
    (result,) = segment(scan, tmp_path / "out", num_parts=2)
    assert len(result.fractions) == 2
    with pytest.raises(ValueError, match=r"must be one of 2, 4, 8 for synthetic-regular, got 5"):
        segment(scan, tmp_path / "five", num_parts=5)


def test_nan_is_outside_of_a_mask(tmp_path, make_nifti):
    """As in masks of SPM."""
    inside = np.zeros(SHAPE, bool)
    inside[3:9, 4:8, 5:] = True
    affine = np.diag([1.5, 2, 3, 1])
    scan = read_nifti(
        make_nifti(tmp_path / "scan.nii", np.arange(inside.size, dtype=np.float32).reshape(SHAPE), affine)
    )
    mask = make_nifti(tmp_path / "mask.nii", np.where(inside, 1, np.nan).astype(np.float32), affine)
    np.testing.assert_array_equal(read_mask(mask, scan), inside)
    nothing = make_nifti(tmp_path / "nothing.nii", np.full(SHAPE, np.nan, np.float32), affine)
    with pytest.raises(InputError, match="marks no voxel"):
        read_mask(nothing, scan)


@pytest.mark.parametrize("smooth", [-1, 101, 1e9, float("inf"), float("nan")])
def test_a_filter_wider_than_volumes_is_refused(smooth):
    with pytest.raises(ValueError, match=r"`smooth` must be in 0\.\.100 voxels, got"):
        Finish(smooth=smooth)
    assert Finish(smooth=100).in_memory
