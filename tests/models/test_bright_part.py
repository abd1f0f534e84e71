"""The evidence of intensities beside a network's logit."""

import pytest
import torch

from diffdiscover3d.data.foreground import Frame, add_brightness, brightness_evidence, find_foreground, robust_scale
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from tests.models.test_framed_discovery import FRAME, SMALL, framed, head


def nested(**config) -> StructureDiscoveryModel:
    torch.manual_seed(0)
    return StructureDiscoveryModel.from_parent(framed(), (1, 2), **SMALL, **config).eval()


def test_the_evidence_is_added_to_the_limited_logit():
    volume = head()[None, None]
    inside = volume > 0
    logit = torch.linspace(-9, 9, volume.numel()).reshape(volume.shape)
    first = logit.clamp(-6, 6) + brightness_evidence(volume, inside)
    second = logit.clamp(-6, 6) + brightness_evidence(volume, inside & (first <= 0))
    expected = logit.clamp(-6, 6) + brightness_evidence(volume, inside & (second <= 0))
    torch.testing.assert_close(add_brightness(logit, volume, inside), expected)
    assert not torch.equal(first > 0, expected > 0)


def test_a_large_lesion_does_not_hide_itself():
    """Tissue of deviation 1, and 30 % of the brain 2.3 brighter; the network is sure of the core alone."""
    volume = torch.randn((1, 1, 20, 24, 16), generator=torch.Generator().manual_seed(0))
    core, rim = torch.zeros_like(volume, dtype=torch.bool), torch.zeros_like(volume, dtype=torch.bool)
    core[:, :, :4], rim[:, :, 4:6] = True, True
    volume = volume + 2.3 * (core | rim)
    inside = torch.ones_like(core)
    prior = torch.where(core, 4.0, torch.where(rim, 1.0, -2.0))
    once, again = prior + brightness_evidence(volume, inside), add_brightness(prior, volume, inside)
    shares = [float((log_odds > 0)[rim].float().mean()) for log_odds in (once, again)]
    assert shares[0] < 0.6 < 0.7 < shares[1], shares
    assert float((again > 0)[~(core | rim)].float().mean()) < 0.02
    # where most of the brain is marked, nothing is left to compare with
    bright = torch.full_like(volume, 6.0)
    torch.testing.assert_close(add_brightness(bright, volume, inside), 6 + brightness_evidence(volume, inside))


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


@pytest.mark.parametrize("part", [0, 3])
def test_a_part_that_is_not_one_of_two_is_refused(part):
    with pytest.raises(ValueError, match="`bright_part` must be one of two"):
        nested(bright_part=part)
