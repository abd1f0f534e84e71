"""The rules that were tried on lesions, on volumes whose answer is known."""

import numpy as np
import pytest
import torch

from benchmarks.explorations import lesions

SHAPE = (1, 1, 20, 24, 16)
BRAIN = torch.ones(SHAPE, dtype=torch.bool)


def test_hysteresis_extends_large_components_only():
    log_odds = torch.full(SHAPE, -5.0)
    log_odds[0, 0, 2:6, 2:6, 2:6] = 2.0  # 64 voxels; 0.3 % of the brain are 23
    log_odds[0, 0, 6:9, 2:6, 2:6] = -0.5  # connected to it
    log_odds[0, 0, 15, 15, 8], log_odds[0, 0, 16, 15, 8] = 2.0, -0.5  # a small one
    log_odds[0, 0, 2:4, 18:20, 2:4] = -0.5  # not connected to any
    found = lesions.hysteresis(log_odds, BRAIN, -1)
    expected = log_odds > 0
    expected[0, 0, 6:9, 2:6, 2:6] = True
    assert torch.equal(found, expected)
    assert torch.equal(lesions.hysteresis(log_odds, BRAIN, -0.4), log_odds > 0)


def test_a_prior_from_the_scan_is_the_share_of_lesion_up_to_its_limits():
    few = torch.full(SHAPE, -9.0)
    assert torch.equal(lesions.share_of_scan(few, BRAIN), few)
    log_odds = few.clone()
    log_odds[0, 0, 0] = 9.0  # 5 % of the voxels; the rest stays below 1e-3
    assert lesions.share_of_scan(log_odds, BRAIN)[0, 0, 0, 0, 0] == pytest.approx(9 + np.log(5), abs=0.02)
    log_odds[0, 0, :8] = 9.0
    assert lesions.share_of_scan(log_odds, BRAIN)[0, 0, 19, 0, 0] == pytest.approx(-7)


def test_a_potts_model_removes_single_voxels_and_keeps_large_regions():
    log_odds = torch.full(SHAPE, -3.0)
    log_odds[0, 0, :10], log_odds[0, 0, 15, 12, 8] = 3.0, 1.0
    found = lesions.potts(log_odds) > 0
    assert found[0, 0, :10].all() and not found[0, 0, 10:].any()


def test_differences_are_of_the_same_volumes():
    row = lesions.compare([0.5, 0.6, 0.7, 0.2], [0.6, 0.6, 0.8, 0.1])
    assert row["difference"] == 0.025 and (row["better"], row["worse"]) == (2, 1)
    assert row["standard_error"] == pytest.approx(np.std([0.1, 0, 0.1, -0.1], ddof=1) / 2, abs=1e-4)


def test_every_rule_gives_a_mask_or_log_odds_of_one_scan():
    generator = torch.Generator().manual_seed(0)
    scan, logit = torch.rand(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator) - 3
    case = lesions.Case("ms", scan, BRAIN, logit, logit, BRAIN, 1.0)
    assert {lesions.BEFORE, lesions.NOW} <= set(lesions.RULES)
    found = {name: rule(case) for name, rule in lesions.RULES.items()}
    assert all(x.shape == SHAPE and torch.isfinite(x.float()).all() for x in found.values())
    assert not torch.equal(found[lesions.BEFORE], found[lesions.NOW])
