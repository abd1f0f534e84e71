"""Inputs and outputs of the pipelines: lists, formats, units and affines."""

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.errors import InputError
from diffdiscover3d.pipelines.volumes import convert, feature_affine, read_volumes

GRID = (6, 5, 4)
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 0, 3.0, -7], [0, 1.5, 0, 11], [0, 0, 0, 1]])


@pytest.fixture
def image():
    data = np.random.default_rng(0).integers(-50, 900, GRID).astype(np.int16)
    return nib.Nifti1Image(data, AFFINE)


def world(affine, index) -> np.ndarray:
    return nib.affines.apply_affine(affine, index)


def test_a_voxel_keeps_its_place_and_value(image, tmp_path):
    nib.save(image, tmp_path / "scan.nii.gz")
    for volume in (image, tmp_path / "scan.nii.gz", str(tmp_path / "scan.nii.gz")):
        ((tensor,), (affine,)) = read_volumes(volume)
        assert tensor.shape == (1, 1, 6, 4, 5) and tensor.dtype == torch.float32
        for index in ((0, 0, 0), (4, 1, 3)):
            inverse = np.linalg.inv(affine)
            i, j, k = np.round(world(inverse, world(AFFINE, index))).astype(int)
            assert tensor[0, 0, i, j, k] == image.dataobj[index]


def test_micrometres_are_brought_to_millimetres(image, tmp_path):
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "cells.nii")
    (_, (of_image,)), (_, (of_path,)) = read_volumes(image), read_volumes(tmp_path / "cells.nii")
    np.testing.assert_allclose(of_image, of_path)
    assert np.linalg.norm(of_image[:3, :3], axis=0) == pytest.approx([0.002, 0.003, 0.0015])


def test_lists_of_everything(image, tmp_path):
    np.save(tmp_path / "stack.npy", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    tensors, affines = read_volumes([image, tmp_path / "stack.npy", torch.rand(2, 4, 4, 3), np.ones((1, 1, 2, 2, 2))])
    assert [tuple(t.shape[2:]) for t in tensors] == [(6, 4, 5), (2, 3, 4), (4, 4, 3), (4, 4, 3), (2, 2, 2)]
    assert len(affines) == 5 and np.array_equal(affines[4], np.eye(4))
    (nested,), _ = read_volumes([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])  # numbers
    assert torch.equal(nested[0, 0].flatten(), torch.arange(8.0))
    with pytest.raises(ValueError, match="empty list"):
        read_volumes([])
    with pytest.raises(InputError, match="no such file"):
        read_volumes([image, "absent.nii.gz"])


def test_images_have_the_axes_of_the_tensor():
    tensor = torch.arange(2 * 3 * 24.0).reshape(2, 3, 2, 3, 4)
    images = convert(tensor, "nifti", [np.eye(4), AFFINE])
    assert [i.shape for i in images] == [(2, 3, 4, 3)] * 2 and np.array_equal(images[1].affine, AFFINE)
    assert np.array_equal(images[1].get_fdata()[..., 2], tensor[1, 2].numpy())
    assert convert(tensor[:, :1], "nifti", [np.eye(4)] * 2)[0].shape == (2, 3, 4)
    assert np.array_equal(convert(tensor.bfloat16(), "np", []), tensor.bfloat16().float().numpy())


def test_features_span_the_scan_from_corner_to_corner():
    affine = feature_affine(AFFINE, (3, 5, 1), (6, 5, 4))
    assert world(affine, (2, 4, 0)) == pytest.approx(world(AFFINE, (5, 4, 0)))
    assert world(affine, (0, 0, 0)) == pytest.approx(world(AFFINE, (0, 0, 0)))
    assert np.linalg.norm(affine[:3, 2]) == pytest.approx(4 * 3)  # one voxel over the whole axis
