"""Which parts of a parent are divided."""

import numpy as np
import pytest
import torch

from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.training.nesting import divided_parts, parent_masks, parent_matrix, share_parts


@pytest.mark.parametrize(
    ("spreads", "num_parts", "children"),
    [
        ([0.1, 0.9], 4, (1, 3)),
        ([0.9, 0.1], 4, (3, 1)),
        ([0.4, 0.1, 0.3, 0.2], 8, (3, 1, 3, 1)),
        ([0.4, 0.1, 0.3, 0.2], 7, (3, 1, 2, 1)),  # the remainder goes to the part with the highest score
        ([0.3, 0.1, 0.2], 6, (3, 1, 2)),
    ],
)
def test_the_even_half_is_kept_whole(spreads, num_parts, children):
    assert share_parts(spreads, num_parts) == children and sum(children) == num_parts


def test_what_was_kept_whole_stays_whole():
    assert share_parts([0.4, 0.1, 0.3, 0.2], 8, whole=[0]) == (1, 1, 3, 3)


def test_nothing_left_to_divide():
    with pytest.raises(ValueError, match="must exceed the parent's 4 parts"):
        share_parts([0.1, 0.2, 0.3, 0.4], 4)


@torch.no_grad()
def test_parent_masks_are_the_parents_parts():
    torch.manual_seed(0)
    parent = StructureDiscoveryModel(2)
    model = StructureDiscoveryModel.from_parent(parent, (3, 1)).eval()
    model.order_parts(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    volume = torch.rand(2, 1, 8, 12, 10)
    masks = model(volume).logits.softmax(dim=1)
    labels = parent.eval().segment(volume).labels.numpy()
    expected = np.stack([labels == 0, labels == 1], axis=1).astype(np.float32)
    np.testing.assert_allclose(parent_masks(masks, parent_matrix(model)).numpy(), expected, atol=1e-6)
    assert divided_parts(model) == [1, 2, 3] and model.parents[0] == 1
    assert parent_matrix(parent) is None and divided_parts(parent) == [0, 1]
