"""Nested networks that subdivide the parts of a coarser one."""

import itertools

import pytest
import torch

from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel

VOLUME = torch.rand(2, 1, 13, 9, 21, generator=torch.Generator().manual_seed(0))


def chain() -> tuple[StructureDiscoveryModel, ...]:
    """Three levels with 2, 4 and 8 parts, with shuffled labels so that no order is correct by chance."""
    torch.manual_seed(1)
    first = StructureDiscoveryModel(2, norm="instance")
    first.order_parts(torch.tensor([0.1, 0.9]))
    second = StructureDiscoveryModel.from_parent(first, (1, 3), norm="instance")
    second.order_parts(torch.tensor([0.3, 0.1, 0.4, 0.2]))
    third = StructureDiscoveryModel.from_parent(second, (3, 1, 1, 3), norm="instance")
    third.order_parts(torch.tensor([0.1, 0.2, 0.3, 0.05, 0.04, 0.15, 0.06, 0.1]))
    return first.eval(), second.eval(), third.eval()


@torch.no_grad()
def test_every_part_lies_in_its_parent():
    levels = chain()
    for coarse, fine in itertools.pairwise(levels):
        found, above = fine.segment(VOLUME), coarse.segment(VOLUME).labels
        assert torch.equal(torch.tensor(fine.parents)[found.labels.long()], above.long())
        torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(2, 13, 9, 21))
        # an undivided part equals the parent's part exactly
        for part, parent in enumerate(fine.parents):
            if fine.config.children[parent] == 1:
                assert torch.equal(found.probabilities[:, part], (above == parent).float())
    assert sorted(levels[1].parents) == [0, 1, 1, 1] and sorted(levels[2].parents) == [0, 0, 0, 1, 2, 3, 3, 3]


@torch.no_grad()
def test_the_network_sees_each_divided_part_standardised():
    _, second, _ = chain()
    labels = second.label_parents(VOLUME)
    seen = []
    second.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    second(VOLUME)
    view = seen[0][:, :, :13, :9, :21]
    divided = second.config.children.index(3)
    for volume, label, shown in zip(VOLUME, labels, view, strict=True):
        inside = volume[label == divided]
        expected = (inside - inside.mean()) / inside.std(correction=0)
        torch.testing.assert_close(shown[label == divided], expected.clamp(-4, 4), rtol=1e-4, atol=1e-4)
        assert not shown[label != divided].any()


@torch.no_grad()
def test_windows_keep_the_nesting():
    torch.manual_seed(2)
    first = StructureDiscoveryModel(2, norm="instance", window_size=32)
    second = StructureDiscoveryModel.from_parent(first, (3, 2), norm="instance", window_size=32).eval()
    volume = torch.rand(1, 1, 16, 24, 70)
    found, above = second.segment(volume), first.eval().segment(volume).labels
    assert torch.equal(torch.tensor(second.parents)[found.labels.long()], above.long())
    assert found.labels.unique().numel() > 1


def test_only_the_new_network_learns():
    first, second, third = chain()
    third.train()
    assert third.network.training and not third.parent_model.training and not third.parent_model.network.training
    assert not any(p.requires_grad for p in third.parent_model.parameters())
    before = {k: v.clone() for k, v in third.parent_model.state_dict().items()}
    third(VOLUME).logits.softmax(dim=1).square().sum().backward()
    assert all(p.grad is not None for p in third.network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in third.parent_model.state_dict().items())
    assert third.levels[-1] is third and len(third.levels) == 3 and first.levels == (first,)
    for mine, theirs in zip(third.levels, (first, second, third), strict=True):
        assert torch.equal(mine.eval().segment(VOLUME).labels, theirs.eval().segment(VOLUME).labels)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_whole_hierarchy_is_one_file(tmp_path, dtype):
    third = chain()[-1]
    torch.nn.Module.to(third, dtype).save_pretrained(tmp_path)
    loaded = StructureDiscoveryModel.from_pretrained(tmp_path).eval()
    torch.nn.Module.to(third, torch.float32)
    assert loaded.parents == third.parents and len(loaded.levels) == 3
    assert torch.equal(loaded.segment(VOLUME).labels, third.segment(VOLUME).labels)


@pytest.mark.parametrize("children", [(1, 1), (3,), (0, 4), (1, 2, 1)])
def test_children_that_do_not_fit(children):
    with pytest.raises(ValueError, match="`children` must be 2 positive numbers"):
        StructureDiscoveryModel.from_parent(StructureDiscoveryModel(2), children)


def test_parent_and_children_go_together():
    with pytest.raises(ValueError, match="go together"):
        StructureDiscoveryModel(4, children=(1, 3))
