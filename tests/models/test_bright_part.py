"""The evidence of intensities beside a network's logit."""

import pytest
import torch

from diffdiscover3d.data.foreground import Frame, find_foreground, robust_scale
from diffdiscover3d.models.brightness import add_brightness
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from tests.models.test_framed_discovery import FRAME, SMALL, framed, head


def nested(**config) -> StructureDiscoveryModel:
    torch.manual_seed(0)
    return StructureDiscoveryModel.from_parent(framed(), (1, 2), **SMALL, **config).eval()


def test_only_the_two_parts_share_anew_and_by_the_posterior():
    volume = head()
    plain, bright = nested(), nested(bright_part=2)
    foreground = find_foreground(volume[None, None])
    frame = Frame.around(foreground, FRAME)
    scaled = frame.crop(robust_scale(volume[None, None], foreground))
    with torch.no_grad():
        soft, mirrored = (plain.scaled_logits(x).softmax(dim=1) for x in (scaled, scaled.flip(2)))
    soft = ((soft + mirrored.flip(2)) / 2).clamp(min=1e-9)
    share = add_brightness((soft[:, 2:] / soft[:, 1:2]).log(), scaled, frame.crop(foreground.float()) > 0.5).sigmoid()
    total = soft[:, 1:2] + soft[:, 2:]
    expected = frame.paste(torch.cat([soft[:, :1], total * (1 - share), total * share], dim=1))
    torch.testing.assert_close(bright.segment(volume).probabilities, expected, atol=1e-5, rtol=1e-4)


def test_the_scans_of_a_batch_do_not_matter_to_each_other():
    model, volumes = nested(bright_part=2), torch.stack([head(seed=0), head(seed=1) * 50])
    together = model.segment(volumes)
    for index, volume in enumerate(volumes):
        torch.testing.assert_close(together.probabilities[index], model.segment(volume).probabilities[0])
    torch.testing.assert_close(together.probabilities.sum(dim=1), torch.ones(2, *head().shape))


@pytest.mark.parametrize("part", [0, 3])
def test_a_part_that_is_not_one_of_two_is_refused(part):
    with pytest.raises(ValueError, match="`bright_part` must be one of two"):
        nested(bright_part=part)
