"""Contrast of deep grey matter, on a volume whose answer is known, and of phantoms beside scans."""

import numpy as np
import pytest

from benchmarks import RESULTS
from benchmarks.explorations.deep_grey import measure, mode, summarise
from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.utils.files import read_json


def ellipsoid(shape=(110, 128, 104)) -> tuple[np.ndarray, np.ndarray]:
    """A brain and the coordinates in its box."""
    points = np.stack(np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in shape], indexing="ij"))
    return (points**2).sum(axis=0) < 1, points


def test_the_contrast_of_known_tissue_is_measured():
    brain, (x, y, z) = ellipsoid()
    deep = (np.abs(x) < 0.6) & (np.abs(y) < 0.6) & (np.abs(z + 0.05) < 0.3)
    row = measure(np.where(deep, 120.0, 100.0) * brain)
    assert [row[f"deep_p{p}"] for p in (25, 50, 95)] == pytest.approx([1.2, 1.2, 1.2], abs=0.01)
    assert row["cortex_p50"] == pytest.approx(1, abs=0.03)
    # lesions in white matter and fluid do not count
    lesions = (np.abs(x) < 0.26) & (np.abs(y) < 0.3) & (z > 0.3)
    row = measure(np.where(lesions, 190.0, np.where(deep, np.where(y > 0.1, 120.0, 20.0), 100.0)) * brain)
    assert [row[f"deep_p{p}"] for p in (75, 95)] == pytest.approx([1.2, 1.2], abs=0.02)


def test_a_brain_without_its_inside_is_refused():
    brain, points = ellipsoid((40, 44, 40))
    with pytest.raises(ValueError, match="whole"):
        measure(np.where((points**2).sum(axis=0) > 0.8, 100.0, 0.0) * brain)


def test_the_mode_is_the_peak_of_two_unequal_groups():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(5, 0.3, 6000), rng.normal(9, 1.0, 5000)])
    assert mode(values) == pytest.approx(5, abs=0.15)


def test_a_summary_holds_lowest_mean_and_highest():
    assert summarise({"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"x": 1.2}}) == {"x": [1.0, 1.4, 2.0]}


def test_grey_matter_of_phantoms_lies_in_the_range_of_scans():
    result = read_json(RESULTS / "deep-grey.json")
    scans = result["lowest_mean_highest"]["scans"]
    for key in ("deep_p50", "deep_p75", "deep_p95", "cortex_p90"):
        low, _, high = scans[key]
        values = np.array([row[key] for row in result["phantoms"].values()])
        assert low <= values.mean() <= high, key
        assert ((low - 0.03 <= values) & (values <= high + 0.03)).sum() >= len(values) - 2, key
    assert measure(brain_phantom("test", 3).volume) == pytest.approx(result["phantoms"]["test-003"], abs=0.002)
