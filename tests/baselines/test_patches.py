"""Features of all voxels at once are those of each patch encoded for itself."""

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.baselines.patches import PatchEncoder, draw_from, draw_patches, encode_volume


def patch_around(volume: torch.Tensor, voxel: tuple[int, int, int], size: int) -> torch.Tensor:
    before = size // 2
    padded = F.pad(volume[None], (before, size - 1 - before) * 3, mode="replicate")[0]
    return padded[:, voxel[0] : voxel[0] + size, voxel[1] : voxel[1] + size, voxel[2] : voxel[2] + size]


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": (3, 3), "channels": (4, 6), "size": 5},
        {"kernels": (3, 2), "channels": (4, 6), "size": 8, "norm": True},
        {"kernels": (3, 3), "channels": (4, 6), "size": 11, "pool": True, "norm": True},
        {"kernels": (3, 3), "channels": (4, 6), "size": 10, "pool": True},
        {"kernels": (5, 5), "channels": (4, 6), "size": 6, "paddings": (2, 0)},
    ],
)
def test_dense_features_are_those_of_the_patches(options, monkeypatch):
    torch.manual_seed(0)
    encoder = PatchEncoder(features=3, **options)
    encoder(torch.randn(16, 1, *[options["size"]] * 3))  # moves the batch norm's averages
    encoder.eval()
    volume = torch.rand(1, 12, 9, 7)
    dense = encoder.dense(volume[None])
    assert dense.shape == (1, 3, 12, 9, 7)
    for voxel in ((0, 0, 0), (11, 8, 6), (5, 4, 3), (7, 0, 6)):
        alone = encoder(patch_around(volume, voxel, options["size"])[None])[0]
        torch.testing.assert_close(dense[0, :, *voxel], alone, rtol=1e-4, atol=1e-5)
    # slabs give the same, border or not
    monkeypatch.setattr("diffdiscover3d.baselines.patches._SLAB_VOXELS", 2 * 9 * 7)
    slabs = encode_volume(encoder, volume, lambda z: 2 * z)
    torch.testing.assert_close(slabs, 2 * dense[0].flatten(1).T, rtol=1e-4, atol=1e-5)


def test_kernels_too_large_for_a_patch():
    with pytest.raises(ValueError, match="leave nothing of patches of side 5"):
        PatchEncoder((3, 5), (2, 2), 3, 5)


def test_patches_are_cut_at_their_corners():
    volume = torch.arange(6 * 7 * 5.0).reshape(1, 6, 7, 5)
    torch.manual_seed(0)
    patches, corners = draw_from(volume, 200, 3)
    for patch, (h, w, d) in zip(patches[:20], corners[:20].tolist(), strict=True):
        assert torch.equal(patch[0], volume[0, h : h + 3, w : w + 3, d : d + 3])
    assert corners.amin(dim=0).tolist() == [0, 0, 0] and corners.amax(dim=0).tolist() == [3, 4, 2]
    with pytest.raises(ValueError, match="smaller than a patch of side 6"):
        draw_from(volume, 1, 6)


def test_patches_come_from_several_volumes():
    torch.manual_seed(0)
    volumes = [{"volume": torch.full((1, 5, 6, 7), float(n))} for n in range(20)]
    patches = draw_patches(volumes, 30, 3, num_volumes=8)
    assert patches.shape == (30, 1, 3, 3, 3) and 4 <= len(patches.unique()) <= 8
