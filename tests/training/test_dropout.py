"""Slot dropout: the mask of a volume does not depend on the process."""

import pytest
import torch
from torch import nn

from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.training.dropout import (
    SlotDropout,
    hashed_masks,
    repeat_masks,
    sees_its_own_batch_only,
    set_slots,
    slot_keys,
    use_slot_dropout,
)


def passed(layer, x, step=3, slots=(0, 1, 2, 3), seed=7, passes=1):
    set_slots([layer], seed, step, list(slots))
    return [layer(x) for _ in range(passes)][-1]


def test_a_batch_is_its_parts():
    layer, x = SlotDropout(0.3, layer=0), torch.rand(4, 2, 3, 4, 5) + 1
    whole = passed(layer, x)
    parts = torch.cat([passed(layer, x[:3], slots=(0, 1, 2)), passed(layer, x[3:], slots=(3,))])
    assert torch.equal(whole, parts)
    last = x.to(memory_format=torch.channels_last_3d)
    assert torch.equal(passed(layer, last)[2:], passed(layer, last[2:], slots=(2, 3)))


def test_versions_of_the_volumes_may_share_a_batch():
    layer, x = SlotDropout(0.5, layer=0), torch.ones(2, 1, 8, 8, 8)
    both = passed(layer, torch.cat([x, x]), slots=(4, 5))
    assert torch.equal(both[:2], passed(layer, x, slots=(4, 5))) and not torch.equal(both[:2], both[2:])
    with pytest.raises(ValueError, match="batch of 3"):
        passed(layer, torch.ones(3, 1, 2, 2, 2), slots=(4, 5))


def test_masks_differ_where_they_should():
    x = torch.ones(2, 1, 8, 8, 8)
    cases = [(0, {}), (1, {}), (0, {"step": 4}), (0, {"slots": (2, 3)}), (0, {"seed": 8}), (0, {"passes": 2})]
    masks = [passed(SlotDropout(0.5, number), x, **{"slots": (0, 1), **more}) for number, more in cases]
    seen = {tuple(one.flatten().tolist()) for mask in masks for one in mask}
    assert len(seen) == 12


def test_the_expectation_is_the_input():
    x = torch.full((3, 1, 40, 40, 40), 2.0)
    out = passed(SlotDropout(0.2, 0), x, slots=(0, 1, 2))
    assert set(out.unique().tolist()) == {0.0, 2.5}
    assert abs(float(out.mean()) - 2) < 0.01


def test_a_pass_that_is_begun_again_draws_its_masks_again():
    layer, x = SlotDropout(0.5, 0), torch.ones(2, 1, 8, 8, 8)
    first, second = passed(layer, x, slots=(0, 1)), layer(x)
    repeat_masks([layer, SlotDropout(0.5, 1)])  # the other one was never used
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second) and not torch.equal(first, second)


def test_evaluation_and_use_outside_training_are_plain():
    layer, x = SlotDropout(0.5, 0), torch.rand(2, 3, 4, 4, 4)
    set_slots([layer], 0, 0, [0, 1])
    assert torch.equal(layer.eval()(x), x)
    torch.manual_seed(0)
    plain = nn.Dropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(SlotDropout(0.5, 0)(x), plain)  # no slots: as torch does it


def test_a_network_keeps_its_weights_and_names():
    model = StructureDiscoveryModel(3, dropout=0.4, norm="instance").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = use_slot_dropout(model)
    assert len(layers) > 3 and all(layer.p == 0.4 and layer.training for layer in layers)
    assert sorted(layer.layer for layer in layers) == list(range(len(layers)))
    assert not [m for m in model.modules() if type(m) is nn.Dropout]
    assert before.keys() == model.state_dict().keys() and use_slot_dropout(model) == layers
    volumes = torch.rand(2, 1, 8, 16, 8)
    set_slots(layers, 0, 5, [0, 1])
    together = model(volumes).logits
    set_slots(layers, 0, 5, [1])
    torch.testing.assert_close(model(volumes[1:]).logits, together[1:], rtol=1e-3, atol=1e-4)
    set_slots(layers, 0, 5, [0])
    assert (model(volumes[1:]).logits - together[1:]).abs().max() > 1e-2


def test_batch_norm_is_recognised():
    assert sees_its_own_batch_only(StructureDiscoveryModel(2, norm="batch"))
    assert not sees_its_own_batch_only(StructureDiscoveryModel(2, norm="instance"))


def test_hashed_masks_are_functions_of_slot_layer_pass_and_version():
    keys, size = slot_keys(0, 5, [0, 1, 2]), 40_000
    masks = hashed_masks(keys, 2, size, 0.3, layer=1, current=0)
    assert masks.shape == (6, size) and (masks.float().mean(dim=1) - 0.7).abs().max() < 0.015
    # slot 1 alone, as on another process, has its row in both versions
    assert torch.equal(hashed_masks(slot_keys(0, 5, [1]), 2, size, 0.3, layer=1, current=0), masks[[1, 4]])
    others = [
        hashed_masks(keys, 2, size, 0.3, layer=2, current=0),
        hashed_masks(keys, 2, size, 0.3, layer=1, current=1),
        hashed_masks(slot_keys(0, 6, [0, 1, 2]), 2, size, 0.3, layer=1, current=0),
        hashed_masks(slot_keys(1, 5, [0, 1, 2]), 2, size, 0.3, layer=1, current=0),
    ]
    rows = torch.cat([masks, *others]).float()
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max() < 0.03  # six standard deviations
    centred = masks.float() - 0.7
    for lag in (1, 2, 3, 8, 64, 1000):  # nor do neighbours have to do with each other
        assert (centred[:, lag:] * centred[:, :-lag]).mean().abs() / 0.21 < 0.01


def test_the_keys_of_a_step_are_written_in_place():
    layer = SlotDropout(0.3, 0)
    set_slots([layer], 0, 1, [0, 1])
    first = layer.draws.keys_on(torch.device("cpu"))
    set_slots([layer], 0, 2, [0, 1])
    second = layer.draws.keys_on(torch.device("cpu"))
    assert second is first and torch.equal(second, slot_keys(0, 2, [0, 1]))
    set_slots([layer], 0, 3, [0])
    assert torch.equal(layer.draws.keys_on(torch.device("cpu")), slot_keys(0, 3, [0]))
