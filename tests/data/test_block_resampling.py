"""Resampling in blocks of planes against that of the whole volume."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from diffdiscover3d.data import block_resampling as module
from diffdiscover3d.data.block_resampling import resample_block, resample_scan, write_block
from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.utils.files import scratch_file
from tests.helpers.opened_scans import open_slabs

SHAPE = (23, 31, 40)


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)


def whole(volume, grid) -> np.ndarray:
    return resize_volume(torch.from_numpy(volume)[None, None], grid)[0, 0].numpy()


@pytest.mark.parametrize("across", range(3))
@pytest.mark.parametrize("grid", [(9, 12, 11), (46, 62, 95), (23, 40, 7), (30, 10, 40)])
def test_blocks_are_those_of_the_whole(volume, grid, across):
    def read(region):
        reads.append(region[across].stop - region[across].start)
        return volume[region]

    reads: list[int] = []
    expected = whole(volume, grid)
    for step in (1, 3, grid[across]):
        blocks = [
            resample_block(read, SHAPE, grid, start, min(start + step, grid[across]), across).numpy()
            for start in range(0, grid[across], step)
        ]
        np.testing.assert_allclose(np.concatenate(blocks, axis=across), expected, atol=2e-4)
    # no more planes than the filter (4 standard deviations on either side) and the interpolation need
    ratio = max(1.0, SHAPE[across] / grid[across])
    assert min(reads) <= 2 * max(1, round(2 * (ratio - 1))) + 2 + ratio


def test_far_planes_are_interpolated_at_the_same_places():
    """On long axes the single precision of torch moves the places; the blocks follow it."""
    steep = np.zeros((1, 1, 5000), np.float32)
    steep[..., ::2] = 1000
    expected = whole(steep, (1, 1, 7001))
    found = resample_block(lambda region: steep[region], steep.shape, (1, 1, 7001), 6500, 7001, 2).numpy()
    np.testing.assert_allclose(found, expected[..., 6500:], atol=0.5)
    exact = np.clip((np.arange(6500, 7001) + 0.5) * (5000 / 7001) - 0.5, 0, 4999)
    exact = ndimage.map_coordinates(steep[0, 0].astype(float), [exact], order=1)
    np.testing.assert_allclose(found[0, 0], exact, atol=2)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "PIL"])
def test_a_scan_in_any_orientation(tmp_path, volume, codes, monkeypatch):
    monkeypatch.setattr(module, "SLAB_VOXELS", 4000)  # several blocks
    affine = np.array([[0.5, 0, 0, 3], [0, 1, 0, -7], [0, 0, 2, 5], [0, 0, 0, 1]])
    turn = nib.orientations.axcodes2ornt(codes)
    nib.save(nib.Nifti1Image(volume, affine).as_reoriented(turn), tmp_path / "scan.nii")
    grid = (14, 31, 52)
    with open_slabs(tmp_path / "scan.nii", tmp_path) as scan, scratch_file(tmp_path, 4 * np.prod(grid)) as scratch:
        small = resample_scan(scan, grid, scratch)
        values = small.read(tuple(slice(0, n) for n in grid))
        assert small.shape == grid and (small.low, small.high) == (values.min(), values.max())
    np.testing.assert_allclose(values, whole(volume, grid), atol=2e-4)
    np.testing.assert_allclose(np.array(small.spacing_mm) * grid, np.array([0.5, 1, 2]) * SHAPE)
    for corner in ((0, 0, 0), SHAPE):  # the same extent, from corner to corner
        at = np.array(corner) / SHAPE * grid - 0.5
        np.testing.assert_allclose(small.affine[:3] @ [*at, 1], affine[:3] @ [*(np.array(corner) - 0.5), 1])


@pytest.mark.parametrize("codes", ["RAS", "LPI", "ASR", "ILP"])
def test_blocks_are_written_where_they_are_read(tmp_path, codes):
    values = np.random.default_rng(1).integers(0, 255, (5, 7, 6), dtype=np.uint8)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(codes), nib.orientations.axcodes2ornt("RAS"))
    with scratch_file(tmp_path, values.size) as scratch:
        shape = [values.shape[int(axis)] for axis in turn[:, 0]]
        stored = RawGrid(scratch.raw, shape, values.dtype, turn)
        across = stored.axes[2]
        for start in range(0, values.shape[across], 2):
            stop = min(start + 2, values.shape[across])
            write_block(stored, start, stop, np.take(values, range(start, stop), axis=across))
        np.testing.assert_array_equal(stored.read(tuple(slice(0, n) for n in values.shape)), values)
