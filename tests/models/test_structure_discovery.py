"""The segmentation network: grid sizes, padding, windows, order of parts and saving."""

import pytest
import torch

from diffdiscover3d.errors import InputError
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel


def make(**config) -> StructureDiscoveryModel:
    torch.manual_seed(0)
    return StructureDiscoveryModel(**{"num_parts": 3, **config}).eval()


@pytest.mark.parametrize("grid", [(16, 8, 24), (13, 9, 21), (2, 3, 5)])
@torch.no_grad()
def test_any_grid(grid):
    volume = torch.rand(2, 1, *grid)
    model = make()
    logits = model(volume).logits
    assert logits.shape == (2, 3, *grid)
    found = model.segment(volume)
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1))
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(2, *grid))
    assert found.labels.shape == (2, *grid) and found.labels.dtype == torch.uint8
    assert torch.equal(found.labels.long(), logits.argmax(dim=1))


@torch.no_grad()
def test_intensity_scale_does_not_matter():
    volume = torch.rand(1, 1, 10, 12, 9)
    model = make()
    torch.testing.assert_close(model(volume * 700 - 1000).logits, model(volume).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_segment_is_in_eval_mode_and_restores_the_mode():
    model = make().train()
    volume = torch.rand(10, 12, 9)
    first, second = model.segment(volume), model.segment(volume)
    assert torch.equal(first.probabilities, second.probabilities) and model.training
    assert first.labels.shape == (1, 10, 12, 9)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_error(training):
    coarse = make()
    model = StructureDiscoveryModel.from_parent(coarse, (1, 2, 1), norm="instance").train(training)
    for volume in (torch.ones(10, 12, 9), torch.full((10, 12, 9), torch.nan)):
        with pytest.raises(InputError):
            model.segment(volume)
        assert model.training is model.network.training is training and not model.parent_model.training


@torch.no_grad()
def test_windows_agree_with_the_whole_far_from_their_seams():
    volume = torch.rand(1, 1, 16, 16, 80)
    whole = make(window_size=80).segment(volume)
    windowed = make(window_size=64).segment(volume)
    assert windowed.probabilities.shape == whole.probabilities.shape
    torch.testing.assert_close(windowed.probabilities.sum(dim=1), torch.ones(1, 16, 16, 80))
    # padding at window borders affects only voxels near the seams
    assert (windowed.labels == whole.labels).float().mean() > 0.9


@torch.no_grad()
def test_parts_are_renumbered_largest_first_and_stay_so(tmp_path):
    model, volume = make(num_parts=4), torch.rand(1, 1, 12, 10, 8)
    before = model(volume).logits
    model.order_parts(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    after = model(volume).logits
    torch.testing.assert_close(after, before[:, [1, 3, 2, 0]], rtol=0, atol=0)
    model.order_parts(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    torch.testing.assert_close(model(volume).logits, after, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = StructureDiscoveryModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(volume).logits, after, rtol=0, atol=0)
    assert loaded.part_order.dtype == torch.int64


@torch.no_grad()
def test_half_precision_files_keep_their_order(tmp_path):
    model = make(num_parts=4)
    model.order_parts(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.nn.Module.to(model, torch.float16).save_pretrained(tmp_path)
    loaded = StructureDiscoveryModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and loaded.part_order.tolist() == [3, 2, 1, 0]


def test_backbone_is_the_authors_choice():
    from monai.networks.nets import UNet

    theirs = UNet(3, 1, 3, (8, 16, 16, 32, 32, 64, 64), (1, 2, 1, 2, 1, 2), dropout=0.2, norm="batch")
    assert str(make().network) == str(theirs)


@pytest.mark.parametrize("bad", [{"num_parts": 1}, {"strides": (1, 2)}])
def test_bad_configs_are_named(bad):
    with pytest.raises(ValueError, match="must"):
        make(**bad)


def test_bad_volumes_are_named():
    with pytest.raises(InputError, match="no contrast"):
        make()(torch.ones(1, 1, 8, 8, 8))
    with pytest.raises(InputError, match="NaN"):
        make()(torch.full((1, 1, 8, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="batch, 1"):
        make()(torch.rand(1, 2, 8, 8, 8))


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (2, 3, 4), (8, 7, 2)])
def test_the_smallest_volumes(norm, shape):
    model = StructureDiscoveryModel(3, norm=norm)
    volume = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    found = model.eval().segment(volume)
    assert found.labels.shape == (2, *shape) and torch.isfinite(found.probabilities).all()
    assert model.train()(volume[:, None]).logits.shape == (2, 3, *shape)  # also in training mode
