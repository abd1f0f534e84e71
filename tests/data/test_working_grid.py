"""The choice of the target spacing, and the resampling of scans to it, against nnU-Net's rule, SciPy and SimpleITK."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from diffdiscover3d.data.datasets.folder import VolumeFolder
from diffdiscover3d.data.formats.reading import grid_of, open_source, read_volume
from diffdiscover3d.data.loading import grid_spacing, load_volumes
from diffdiscover3d.data.working_grid import WorkingGrid, coarsen_spacing, resampled_shape, target_spacing
from diffdiscover3d.errors import InputError
from tests.helpers import volume_files as files

STACKS = [(512, 512, 60), (512, 512, 30), (480, 512, 30), (512, 512, 28), (512, 512, 31)]
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("spacings", "shapes", "expected"),
    [
        ([(1, 1, 1), (2, 1, 3), (1, 1.5, 2)], [(90, 80, 70)] * 3, (1, 1, 2)),
        # sorted, the spacings along z are 20, 20, 40, 40, 50; the 10th percentile is at 0.4 of the way from the first
        ([(5, 5, z) for z in (20, 40, 40, 50, 20)], STACKS, (5, 5, 20)),
        ([(5, 5, z) for z in (24, 40, 40, 50, 34)], STACKS, (5, 5, 28)),
        ([(5, 5, z) for z in (1, 40, 40, 50, 1)], STACKS, (5, 5, 5)),  # never finer than the other axes
        ([(5, 5, z) for z in (20, 40, 40, 50, 20)], [(90, 90, 31)] * 5, (5, 5, 40)),  # enough slices: the median
        ([(z, 5, 5) for z in (24, 40, 40, 50, 34)], [shape[::-1] for shape in STACKS], (28, 5, 5)),
    ],
)
def test_target_spacing_is_nnunets(spacings, shapes, expected):
    assert target_spacing(spacings, shapes) == expected


def test_axes_that_are_much_finer_are_coarsened_first():
    stack = ([(5e-6, 5e-6, 4e-5)] * 2, [(512, 512, 30)] * 2)
    x, y, z = coarsen_spacing((5e-6, 5e-6, 4e-5), *stack, voxels=230 * 230 * 30)
    assert z == 4e-5 and x == y and 230 / 1.04 < 512 * 5e-6 / x <= 230.5
    x, y, z = coarsen_spacing((5e-6, 5e-6, 4e-5), *stack, voxels=50**3)
    assert (
        z > 4e-5
        and 1.9 < z / x < 2.1
        and np.prod(resampled_shape((512, 512, 30), stack[0][0], (x, y, z))) > 0.9 * 50**3
    )
    assert coarsen_spacing((1, 1, 2), [(1, 1, 2)] * 3, [(9, 8, 7)] * 3, 50**3) == (1, 1, 2)
    # the largest scan counts as well
    mixed = ([(1, 1, 1)] * 3, [(20, 20, 20), (20, 20, 20), (80, 40, 40)])
    coarse = coarsen_spacing((1, 1, 1), *mixed, 50**3, most_voxels=20**3)
    assert np.prod(resampled_shape((80, 40, 40), (1, 1, 1), coarse)) <= 20**3


def smooth_noise(shape, seed=0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5).astype(np.float32)


def resampled_by_scipy(data, grid):
    """Gaussian smoothing where voxels become larger, then linear interpolation at the centres of the new voxels."""
    factors = [n / m for n, m in zip(data.shape, grid, strict=True)]
    smooth = ndimage.gaussian_filter(data.astype(float), [max(0, (f - 1) / 2) for f in factors], mode="nearest")
    places = np.meshgrid(*[(np.arange(m) + 0.5) * f - 0.5 for m, f in zip(grid, factors, strict=True)], indexing="ij")
    return smooth, ndimage.map_coordinates(smooth, places, order=1, mode="nearest")


@pytest.mark.parametrize("spacing", [(2.1, 3.0, 4.0), (0.9, 1.1, 1.3), (3.0, 1.0, 3.0)])
def test_scans_of_a_folder_are_resampled_as_by_scipy_and_simpleitk(tmp_path, spacing):
    sitk = pytest.importorskip("SimpleITK")
    data = smooth_noise((24, 20, 15))
    # an oblique scan, whose file has other axes: P, I, R
    canonical = np.block(
        [[TURN @ np.diag([1.5, 2, 3]), np.array([[3], [-7], [5]])], [np.zeros((1, 3)), np.ones((1, 1))]]
    )
    image = nib.Nifti1Image(data, canonical)
    orientation = nib.orientations.axcodes2ornt(("P", "I", "R"))
    nib.save(image.as_reoriented(orientation), tmp_path / "scan.nii.gz")
    grid = resampled_shape(data.shape, (1.5, 2, 3), spacing)
    folder = VolumeFolder(tmp_path, working_grid=WorkingGrid(spacing=spacing))
    item = folder[0]
    assert item["volume"].shape[1:] == grid and item["volume"].min() == 0 and item["volume"].max() == 1
    true = tuple(n * edge / m for n, edge, m in zip(data.shape, (1.5, 2, 3), grid, strict=True))
    assert item["spacing_mm"] == pytest.approx(true) and true == pytest.approx(spacing, rel=0.06)
    smooth, expected = resampled_by_scipy(data, grid)
    scaled = (expected - expected.min()) / np.ptp(expected)
    np.testing.assert_allclose(item["volume"][0], scaled, atol=1e-5)
    # in world space: grid and scan have the same corners
    source = sitk.GetImageFromArray(smooth.T)
    directions, edges = canonical[:3, :3] / [1.5, 2, 3], np.array([1.5, 2, 3])
    source.SetSpacing(edges.tolist()), source.SetDirection(directions.ravel().tolist())
    source.SetOrigin(canonical[:3, 3].tolist())
    corner = canonical[:3, 3] + directions @ (np.array(true) / 2 - edges / 2)
    theirs = sitk.Resample(
        source, [int(n) for n in grid], sitk.Transform(), sitk.sitkLinear, corner.tolist(), true,
        directions.ravel().tolist(), float("nan"),
    )  # fmt: skip
    theirs = sitk.GetArrayFromImage(theirs).T  # NaN outside of the centres of the outer voxels
    known = np.isfinite(theirs)
    assert known.mean() > 0.4
    np.testing.assert_allclose(theirs[known], expected[known], atol=1e-5)
    assert folder[0]["volume"] is item["volume"]  # kept resampled


def test_spacings_of_a_folder(tmp_path):
    for number, edge in enumerate((1.0, 2.0, 2.0)):
        nib.save(nib.Nifti1Image(smooth_noise((12, 10, 8)), np.diag([edge, edge, 3, 1])), tmp_path / f"{number}.nii")
    volumes = load_volumes(str(tmp_path))
    volumes.shapes = [tuple(volumes[i]["volume"].shape[1:]) for i in range(3)]
    assert grid_spacing(volumes) == (2, 2, 3)
    assert grid_spacing(volumes, (6, 10, 4)) == (4, 2, 6)
    assert grid_spacing(load_volumes("synthetic-regular")) == (1, 1, 1)


def test_voxels_of_another_scale_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(smooth_noise((12, 10, 8)), np.diag([2e-4, 2e-4, 2e-4, 1])), tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"a\.nii: has voxels of 0\.2.*µm, and the model works on voxels of 1×1×1 mm"):
        VolumeFolder(tmp_path, working_grid=WorkingGrid(spacing=(1, 1, 1)))[0]


def test_unknown_voxel_sizes(tmp_path):
    data = smooth_noise((12, 10, 8))
    np.save(tmp_path / "a.npy", data)
    with pytest.raises(InputError, match=r"a\.npy: gives no voxel size; use --spacing-unit voxel"):
        VolumeFolder(tmp_path, working_grid=WorkingGrid(spacing=(1, 1, 1)))[0]
    item = VolumeFolder(tmp_path, working_grid=WorkingGrid(spacing=(2, 1, 2), unit="voxel"))[0]
    assert item["volume"].shape == (1, 6, 10, 4) and item["spacing_mm"] == (2, 1, 2)


@pytest.mark.parametrize("number", [0, 5, 27, 40])
@pytest.mark.parametrize("kind", ["nii", "nrrd", "mgz"])
def test_the_grid_is_known_before_voxels_are_read(tmp_path, kind, number):
    pytest.importorskip("SimpleITK")
    array, affine = files.stored(files.ORIENTATIONS[number], smooth_noise((6, 7, 5)))
    if kind == "nii":
        nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii")
    else:
        {"nrrd": files.write_sitk, "mgz": files.write_mgh}[kind](tmp_path / f"scan.{kind}", array, affine)
    read = read_volume(tmp_path / f"scan.{kind}")
    with open_source(tmp_path / f"scan.{kind}") as source:
        shape, spacing, unit = grid_of(source)
    assert shape == read.shape and spacing == pytest.approx(read.spacing_mm, rel=1e-5) and unit == read.unit


def test_a_grid_of_fixed_shape_has_it_for_every_scan():
    assert WorkingGrid(shape=(4, 5, 6)).of((90, 80, 70), (1, 1, 1)) == (4, 5, 6)
    assert json.loads(json.dumps(WorkingGrid(spacing=(1, 2, 3)).of((9, 8, 7), (1, 1, 1)))) == [9, 4, 2]
    assert torch.Size(WorkingGrid(spacing=(0.5, 1, 2)).of((9, 8, 7), (1, 1, 2))) == (18, 8, 7)
