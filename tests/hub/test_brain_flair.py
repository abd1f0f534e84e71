"""The embedded model `brain-flair` on phantoms that it has not seen."""

import numpy as np
import pytest

from diffdiscover3d.data.datasets.brain_phantom import SPACING_MM, brain_phantom
from diffdiscover3d.evaluation.metrics import binary_dice
from diffdiscover3d.hub.registry import embedded_models, load_discovery

BACKGROUND, BRAIN, LESION = 0, 1, 2
MIB = 2**20


@pytest.fixture(scope="module")
def model():
    return load_discovery("brain-flair")


def test_it_is_nested_framed_and_small(model):
    assert [level.config.num_parts for level in model.levels] == [2, 3] and model.parents == (0, 1, 1)
    assert model.config.scaling == "robust" and tuple(model.config.frame) == (96, 112, 96)
    sizes = {
        name: sum(p.stat().st_size for p in embedded.folder.rglob("*.safetensors"))
        for name, embedded in embedded_models().items()
    }
    assert sizes["brain-flair"] <= 6 * MIB and sum(sizes.values()) <= 20 * MIB


@pytest.mark.parametrize("index", [0, 2])
def test_parts_have_constant_numbers(model, index):
    phantom = brain_phantom("validation", index)
    labels = model.segment(phantom.volume).labels[0].numpy()
    assert binary_dice(labels != BACKGROUND, phantom.labels[0] == 1) > 0.9
    assert binary_dice(labels == LESION, phantom.labels[1] == 2) > 0.7


def test_a_healthy_phantom_has_nearly_no_lesion(model):
    phantom = brain_phantom("test", 3)
    labels = model.segment(phantom.volume).labels[0].numpy()
    assert (labels == LESION).sum() * SPACING_MM**3 / 1000 < 2


def test_level_1_agrees_with_level_2(model):
    volume = brain_phantom("validation", 1).volume
    coarse, fine = (level.segment(volume).labels[0].numpy() for level in model.levels)
    assert np.mean((coarse == BRAIN) == (fine != BACKGROUND)) > 0.98
