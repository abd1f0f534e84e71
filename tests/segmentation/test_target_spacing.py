"""A model with a target spacing: scans are resampled to it, and labels come back to the scan's grid."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_from_to
from scipy import ndimage

from diffdiscover3d.data.datasets.synthetic import synthesize
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import InputError, MemoryLimitError
from diffdiscover3d.hub.registry import embedded_models
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.segmentation import preflight
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.preflight import MemoryPlan
from diffdiscover3d.segmentation.resampled import ResampledFinder
from tests.helpers import volume_files as files

TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
OBLIQUE = np.block([[TURN @ np.diag([1.5, 2, 3]), np.array([[3], [-7], [5]])], [np.zeros((1, 3)), np.ones((1, 1))]])


def noise(shape=(24, 20, 14)):
    return ndimage.gaussian_filter(np.random.default_rng(4).normal(100, 10, shape), 1).astype(np.float32)


def labels_of(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Untrained networks of 3 parts and of the 5 that divide them, without a target spacing."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        coarse = StructureDiscoveryModel(3, norm="instance").eval()
        return coarse, StructureDiscoveryModel.from_parent(coarse, (2, 1, 2), norm="instance").eval()


def with_spacing(folder, network, spacing, unit="mm"):
    """Save a network, with a target spacing at every level."""
    network.save_pretrained(folder)
    return add_spacing(folder, spacing, unit)


def add_spacing(folder, spacing, unit="mm"):
    config = inner = json.loads((folder / "config.json").read_text())
    while inner:
        inner |= {"spacing": spacing, "spacing_unit": unit}
        inner = inner.get("parent")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize(("spacing", "grid"), [((3, 4, 4), (12, 10, 10)), ((1, 1.6, 4.2), (36, 25, 10))])
def test_parts_are_found_at_the_target_spacing_and_brought_back(tmp_path, networks, spacing, grid):
    data, (coarse, fine) = noise(), networks
    scan = nib.Nifti1Image(data, OBLIQUE).as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "R")))
    nib.save(scan, tmp_path / "scan.nii.gz")
    model = with_spacing(tmp_path / "model", fine, spacing)
    (result,) = segment(tmp_path / "scan.nii.gz", tmp_path / "out", model=model, level="all", probabilities=True)
    small = resize_volume(torch.from_numpy(data)[None, None], grid)
    soft = resize_volume(coarse.segment(small).probabilities, data.shape)[0]
    found = {}
    for level, files_of_level in result.levels.items():
        image = nib.load(files_of_level.labels)
        assert image.shape == scan.shape and np.allclose(image.affine, scan.affine, atol=1e-5)
        canonical = nib.as_closest_canonical(image)
        assert np.allclose(canonical.affine, OBLIQUE, atol=1e-5)
        found[level] = np.asarray(canonical.dataobj)
        written = json.loads(files_of_level.sidecar.read_text())
        assert written["model"]["spacing"] == list(spacing) and written["model"]["spacing_unit"] == "mm"
        voxel = [n * edge / m for n, edge, m in zip(data.shape, (1.5, 2, 3), grid, strict=True)]
        assert written["working_grid"] == {"shape": list(grid), "voxel_size_mm": pytest.approx(voxel, rel=1e-5)}
    np.testing.assert_array_equal(found[1], soft.argmax(dim=0).numpy())
    assert len(np.unique(found[1])) == 3  # otherwise the comparison means little
    assert (np.array(fine.parents)[found[2]] == found[1]).all()  # nested exactly
    probabilities = np.asarray(nib.as_closest_canonical(nib.load(result.levels[2].probabilities)).dataobj)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=-1), found[2])


@pytest.mark.parametrize("codes", ["PIR", "LAS"])
@pytest.mark.parametrize(("spacing", "grid"), [((3, 4, 4), (12, 10, 10)), ((1, 1.6, 4.2), (36, 25, 10))])
def test_large_scans_are_resampled_in_blocks(tmp_path, networks, spacing, grid, codes, monkeypatch):
    """From disk in blocks of planes: the parts that are found in memory, also where the grid needs several windows."""
    scan = nib.Nifti1Image(noise(), OBLIQUE).as_reoriented(nib.orientations.axcodes2ornt(codes))
    nib.save(scan, tmp_path / "scan.nii.gz")
    model = with_spacing(tmp_path / "model", networks[1], spacing)
    inner = config = json.loads((tmp_path / "model" / "config.json").read_text())
    while inner:
        inner["window_size"] = 16  # the scan has more voxels than a window
        inner = inner.get("parent")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for name in ("segmentation.resampled", "data.block_resampling"):
        monkeypatch.setattr(f"diffdiscover3d.{name}.SLAB_VOXELS", 2000)  # several blocks
    options = {"model": model, "level": "all", "probabilities": True, "statistics": True}
    made = []
    make = ResampledFinder.__init__
    monkeypatch.setattr(ResampledFinder, "__init__", lambda self, *args: (made.append(args[-1]), make(self, *args))[1])
    (slabs,) = segment(tmp_path / "scan.nii.gz", tmp_path / "slabs", **options)
    assert made == [grid]
    monkeypatch.setattr("diffdiscover3d.segmentation.files.plan_memory", lambda *_, **__: MemoryPlan(False, None))
    (memory,) = segment(tmp_path / "scan.nii.gz", tmp_path / "memory", **options)
    assert len(made) == 1
    labels = {}
    for level in (1, 2):
        one, two = slabs.levels[level], memory.levels[level]
        soft, expected = (labels_of(files.probabilities) for files in (one, two))
        np.testing.assert_allclose(soft, expected, atol=1e-4)
        two_best = np.sort(expected, axis=-1)[..., -2:]
        decided = two_best[..., 1] - two_best[..., 0] > 1e-3
        assert decided.mean() > 0.97
        labels[level] = labels_of(one.labels)
        np.testing.assert_array_equal(labels[level][decided], labels_of(two.labels)[decided])
        np.testing.assert_array_equal(labels[level], soft.argmax(axis=-1))
        grids = [json.loads(files.sidecar.read_text())["working_grid"] for files in (one, two)]
        assert grids[0] == grids[1] and grids[0]["shape"] == list(grid)
        assert nib.load(one.labels).header == nib.load(two.labels).header
        voxels = [int(row["voxels"]) for row in csv.DictReader(one.table.open(), delimiter="\t")]
        assert voxels == np.bincount(labels[level].ravel(), minlength=len(voxels)).tolist()
    assert (np.array(networks[1].parents)[labels[2]] == labels[1]).all() and len(np.unique(labels[2])) > 3


def test_a_scan_at_the_target_spacing_is_not_resampled(tmp_path, networks):
    nib.save(nib.Nifti1Image(noise(), OBLIQUE), tmp_path / "scan.nii.gz")
    plain, spaced = tmp_path / "plain", with_spacing(tmp_path / "spaced", networks[1], (1.5001, 2, 2.9999))
    networks[1].save_pretrained(plain)
    results = [segment(tmp_path / "scan.nii.gz", tmp_path / Path(m).name, model=str(m))[0] for m in (plain, spaced)]
    assert results[0].labels.parent != results[1].labels.parent
    np.testing.assert_array_equal(*(labels_of(r.labels) for r in results))
    assert all("working_grid" not in json.loads(r.sidecar.read_text()) for r in results)


def test_one_volume_at_two_spacings_has_the_same_parts(tmp_path):
    """A synthetic cell, as it is and with smaller and flatter voxels, by the embedded model at 1 mm."""
    sample = synthesize("regular", "test", 0)
    spaced, plain = tmp_path / "spaced", embedded_models()["synthetic-regular"].discovery
    shutil.copytree(plain, spaced)
    add_spacing(spaced, (1, 1, 1))
    original = nib.Nifti1Image(sample.volume.astype(np.float32), np.diag([1.0, 1, 1, 1]))
    shape, edges = (80, 67, 25), np.array([50 / 80, 50 / 67, 2])
    affine = np.diag([*edges, 1])
    affine[:3, 3] = edges / 2 - 0.5  # the same corner
    other = resize_volume(torch.from_numpy(original.get_fdata(dtype=np.float32))[None, None], shape)[0, 0].numpy()
    (
        nib.save(original, tmp_path / "original.nii.gz"),
        nib.save(nib.Nifti1Image(other, affine), tmp_path / "other.nii.gz"),
    )

    def agreement(model):
        """Mean Dice of the parts of both files, compared in world space on the original's grid."""
        out, scans = tmp_path / Path(model).name, [str(tmp_path / f"{name}.nii.gz") for name in ("original", "other")]
        one, two = (nib.load(r.labels) for r in segment(scans, out, model=str(model), level=2))
        two = np.asarray(resample_from_to(two, one, order=0, mode="nearest").dataobj)
        one = np.asarray(one.dataobj)
        dice = [2 * np.sum((one == k) & (two == k)) / (np.sum(one == k) + np.sum(two == k)) for k in range(4)]
        return np.mean(dice)

    resampled = agreement(spaced)
    assert resampled > 0.93 and resampled > agreement(plain) + 0.02


def test_anisotropic_stacks_in_nanometres(tmp_path, networks):
    pytest.importorskip("mrcfile")
    values = noise((64, 60, 8))
    path = files.write_mrc(tmp_path / "stack.mrc", np.ascontiguousarray(values.T), size=(50.0, 50.0, 400.0))
    model = with_spacing(tmp_path / "model", networks[0], (20e-6, 20e-6, 40e-6))
    (result,) = segment(path, tmp_path / "out", model=model)
    written = json.loads(result.sidecar.read_text())
    assert written["working_grid"] == {"shape": [16, 15, 8], "voxel_size_mm": [2e-5, 2e-5, 4e-5]}
    assert written["input"]["voxel_size"] == [5, 5, 40] and written["input"]["unit"] == "nm"


def test_unknown_voxel_sizes(tmp_path, networks):
    array = noise()
    np.save(tmp_path / "scan.npy", array)
    in_mm = with_spacing(tmp_path / "mm", networks[0], (2, 2, 2))
    in_voxels = with_spacing(tmp_path / "voxels", networks[0], (2, 2, 1), "voxel")
    (result,) = segment(tmp_path / "scan.npy", tmp_path / "out", model=in_mm)
    assert any("gives no voxel size: its voxels were taken as 2×2×2 mm" in note for note in result.notes)
    np.testing.assert_array_equal(np.load(result.labels), networks[0].segment(array).labels[0])
    (result,) = segment(tmp_path / "scan.npy", tmp_path / "o2", model=in_mm, voxel_size="4mm")
    assert json.loads(result.sidecar.read_text())["working_grid"]["shape"] == [48, 40, 28]
    small = networks[0].segment(resize_volume(torch.from_numpy(array)[None, None], (12, 10, 14)))
    expected = resize_volume(small.probabilities, array.shape)[0].argmax(dim=0)
    (result,) = segment(tmp_path / "scan.npy", tmp_path / "o4", model=in_voxels)
    grid = {"shape": [12, 10, 14], "voxel_size_voxels": [2, 2, 1]}
    assert json.loads(result.sidecar.read_text())["working_grid"] == grid
    np.testing.assert_array_equal(segment(array, model=in_voxels), expected)
    with pytest.raises(InputError, match=r"scan\.npy: has voxels of 1×1×1 µm.*2×2×2 mm; correct the voxel size"):
        segment(tmp_path / "scan.npy", tmp_path / "o3", model=in_mm, voxel_size="1um")


def test_images_in_memory_have_their_spacing(tmp_path, networks):
    model = with_spacing(tmp_path / "model", networks[1], (3, 4, 4))
    image = nib.Nifti1Image(noise(), OBLIQUE)
    nib.save(image, tmp_path / "scan.nii.gz")
    (result,) = segment(tmp_path / "scan.nii.gz", tmp_path / "out", model=model)
    np.testing.assert_array_equal(segment(image, model=model).dataobj, labels_of(result.labels))


def test_within_a_mask_the_spacing_is_the_same(tmp_path, networks):
    data, mask = noise((30, 28, 20)), np.zeros((30, 28, 20), np.uint8)
    box = (slice(4, 24), slice(6, 26), slice(2, 18))
    mask[box] = 1
    for name, values in (("scan", data), ("mask", mask)):
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1, 2, 1])), tmp_path / f"{name}.nii.gz")
    model = with_spacing(tmp_path / "model", networks[0], (2, 2, 2))
    (result,) = segment(tmp_path / "scan.nii.gz", tmp_path / "out", model=model, mask=tmp_path / "mask.nii.gz")
    assert json.loads(result.sidecar.read_text())["working_grid"] == {"shape": [10, 10, 16], "voxel_size_mm": [2, 2, 2]}
    small = networks[0].segment(
        resize_volume(torch.from_numpy(np.ascontiguousarray(data[box]))[None, None], (10, 10, 16))
    )
    expected = resize_volume(small.probabilities, (20, 20, 16))[0].argmax(dim=0).numpy() + 1
    np.testing.assert_array_equal(labels_of(result.labels)[box], expected)


def test_a_scan_too_large_to_be_resampled_is_refused_with_the_remedy(tmp_path, networks, monkeypatch):
    nib.save(nib.Nifti1Image(noise(), OBLIQUE), tmp_path / "scan.nii.gz")
    monkeypatch.setattr("diffdiscover3d.utils.memory.free_memory", lambda: 2**20)
    model = with_spacing(tmp_path / "model", networks[0], (3, 4, 4))
    with pytest.raises(MemoryLimitError, match="resample it to 12 x 10 x 10 voxels, the grid the model works on"):
        segment(tmp_path / "scan.nii.gz", tmp_path / "out", model=model)
    assert preflight.LARGE > 2**20


def test_configurations(networks):
    with pytest.raises(ValueError, match="`spacing` must be three positive numbers"):
        StructureDiscoveryModel(2, spacing=(1, 1))
    with pytest.raises(ValueError, match="`spacing` must be the parent's"):
        StructureDiscoveryModel.from_parent(networks[0], (2, 1, 1), spacing=(1, 1, 1))
    with pytest.raises(ValueError, match="left out with a frame"):
        StructureDiscoveryModel(2, spacing=(1, 1, 1), scaling="robust", frame=(16, 16, 16))
    coarse = StructureDiscoveryModel(2, spacing=(1, 2, 3), spacing_unit="voxel")
    fine = StructureDiscoveryModel.from_parent(coarse, (2, 1))
    assert tuple(fine.config.spacing) == (1, 2, 3) and fine.config.spacing_unit == "voxel"
