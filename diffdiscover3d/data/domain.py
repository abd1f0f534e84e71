"""Whether a scan looks like the scans that a model was trained on, by a few numbers about its intensities and texture.

A network that was trained on smooth cells divides a CT scan into parts, too, but these have no meaning. The numbers are
taken from the middle of a scan, normalised as for the networks, and compared with those of the training scans.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.data.formats.units import UNKNOWN

DOMAIN_FILE = "domain.json"
# distance from which a scan is reported as unlike the training scans; synthetic test cells are below 1.5, real scans
# above 1.8 (benchmarks/results/domain.json)
FAR = 1.7
# ratio of the edges of a voxel, relative to the training scans, from which a scan is reported; at 2 the labels of 4.7 %
# of the voxels of a synthetic cell change, at 5 of 15.6 % (tests/robustness/test_surroundings.py)
STRETCHED = 1.5
_EDGE = 96  # voxels: the side of the block in the middle that is looked at
_LAGS = (1, 2, 4)  # voxels
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NAMES = (
    *(f"{100 * q:g} % quantile" for q in _QUANTILES),
    "spread of intensities",
    *(f"correlation of voxels {lag} apart" for lag in _LAGS),
    *(f"evenness of differences {lag} apart" for lag in _LAGS),
)
# standard deviations added to the diagonal of the covariance, for few and for many training scans
_FEW, _MANY = 0.05, 0.01


def signature(scan: NiftiVolume | SlabScan) -> list[float]:
    """The numbers of a scan, in the order of [`NAMES`]."""
    region = tuple(slice((n - min(n, _EDGE)) // 2, (n + min(n, _EDGE)) // 2) for n in scan.shape)
    if isinstance(scan, SlabScan):
        return describe_block(scan.normalized(region))
    low, high = float(scan.data.min()), float(scan.data.max())
    return describe_block((scan.data[region] - low) / max(high - low, np.finfo(np.float32).tiny))


def describe_block(block: np.ndarray) -> list[float]:
    """The numbers of an (h, w, d) block of intensities in [0, 1]."""
    centred = block - block.mean()
    variance = float((centred**2).mean())
    numbers = [*np.quantile(block, _QUANTILES), np.sqrt(variance)]
    correlations, evenness = [], []
    for lag in _LAGS:
        pairs = [
            (moved[lag:], moved[:-lag])
            for moved in (np.moveaxis(centred, axis, 0) for axis in range(3) if block.shape[axis] > lag)
        ]
        products = [float((a * b).mean()) for a, b in pairs]
        correlations.append(float(np.mean(products)) / variance if products and variance > 0 else 0.0)
        # 0.8 for noise, less where a scan is flat but for its edges
        ratios = [float(np.abs(a - b).mean()) / max(float(np.sqrt(((a - b) ** 2).mean())), 1e-9) for a, b in pairs]
        evenness.append(float(np.mean(ratios)) if ratios else 0.0)
    numbers += correlations + evenness
    return [round(float(n), 5) for n in numbers]


def summarise(
    signatures: Sequence[Sequence[float]], spacings_mm: Sequence[Sequence[float]] = ((1.0, 1.0, 1.0),)
) -> dict:
    """What is stored with a model about the scans it was trained on, as JSON values.

    Args:
        signatures: of the training scans, one or more.
        spacings_mm: their voxel sizes, of which only the proportions are stored.
    """
    table = np.asarray(signatures, dtype=float)
    count = len(table)
    if count < 3 * len(NAMES):  # too few for an estimate of the covariances
        covariance = np.diag(table.var(axis=0) * (1 + 4 / count) + _FEW**2)
    else:
        covariance = np.cov(table.T) + np.diag(np.full(len(NAMES), _MANY**2))
    return {
        "scans": count,
        "names": list(NAMES),
        "voxel_proportions": [round(float(x), 4) for x in np.median([_proportions(s) for s in spacings_mm], axis=0)],
        "median": [round(float(x), 5) for x in np.median(table, axis=0)],
        "covariance": [[float(f"{x:.5g}") for x in row] for row in covariance],
    }


def distance(numbers: Sequence[float], domain: Mapping) -> tuple[float, str]:
    """Mahalanobis distance of a scan from the training scans, divided by the square root of the number of statistics.

    About 1 for a scan like them.

    Returns:
        The distance, and the name of the number that differs most.

    Raises:
        ValueError: if the stored numbers are others than these.
    """
    if list(domain["names"]) != list(NAMES):
        raise ValueError("the model's domain was described by another version of diffdiscover3d.")
    covariance = np.asarray(domain["covariance"], float)
    away = np.asarray(numbers) - np.asarray(domain["median"], float)
    total = float(np.sqrt(max(away @ np.linalg.solve(covariance, away), 0.0) / len(away)))
    return total, NAMES[int(np.argmax(np.abs(away) / np.sqrt(np.diag(covariance))))]


def _proportions(spacing_mm: Sequence[float]) -> np.ndarray:
    """Edge lengths of a voxel, (3,), divided by the shortest."""
    return np.asarray(spacing_mm, float) / min(spacing_mm)


def voxel_note(scan: NiftiVolume | SlabScan, domain: Mapping | None, model: str) -> str | None:
    """A line for the user if voxels are stretched compared with those of the training scans; `None` if not, or unknown.

    The networks see voxels and not millimetres.
    """
    if domain is None or scan.unit == UNKNOWN:
        return None
    try:
        usual = np.asarray(domain["voxel_proportions"], float).reshape(3)
        ratios = _proportions(scan.spacing_mm) / usual
        stretch = float(ratios.max() / ratios.min())
    except (KeyError, TypeError, ValueError):  # of another version: nothing can be compared
        return None
    if not STRETCHED <= stretch < np.inf:
        return None
    return (
        f"the voxels are stretched {stretch:.3g} times along one axis compared with the scans that {model} was trained "
        "on, and the network takes no account of it; resample the scan, or train a model with `diffdiscover3d discover`"
    )


def domain_note(scan: NiftiVolume | SlabScan, domain: Mapping | None, model: str) -> str | None:
    """A line for the user if a scan is far from the training scans of a model; `None` if it is not, or unknown."""
    if domain is None:
        return None
    try:
        away, name = distance(signature(scan), domain)
    except (KeyError, TypeError, ValueError, np.linalg.LinAlgError):  # of another version: nothing can be compared
        return None
    if away < FAR:
        return None
    return (
        f"unlike the scans that {model} was trained on (distance {away:.1f}, most in {name}), so its parts may "
        "mean nothing here; `diffdiscover3d discover FOLDER` trains a model on your own scans"
    )
