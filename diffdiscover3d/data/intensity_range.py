"""Notes about scans whose intensity range is ruled by a few voxels or by a fill value.

Min-max normalisation maps the lowest and highest value to 0 and 1. Outliers, or a constant outside the field of view,
then compress the contrast of everything else.
"""

import numpy as np

_FEW = 1_000  # one voxel in so many may be an outlier, at least `_FEWEST`
_FEWEST = 10
_BULK = 0.25  # a note is due if all other voxels lie within less than this share of the range
_FILL = 0.01  # least share of the voxels with one extreme value to call it a fill value
# least gap between a fill value and the other values, as a share of the range: at 1.7 % less than 1 % of the labels of
# a synthetic cell change, at 3.4 % 1.5 % do
_GAP = 0.02
_STEPS = 5  # and as a multiple of the typical step between the next values, which are far apart in coarse data

_SAMPLE = 1_000_000  # values are looked at, at most


def describe_volume_range(volume: np.ndarray) -> list[str]:
    """[`describe_range`] of a volume in memory, or of those of its voxels that count; any shape."""
    step = max(1, volume.size // _SAMPLE)
    return describe_range(volume.reshape(-1)[::step], volume.min(), volume.max())


def describe_range(sample: np.ndarray, low: float, high: float) -> list[str]:
    """Notes about the range of a scan that is normalised by minimum and maximum.

    Args:
        sample: values of the scan, all of them or evenly spaced ones; any shape.
        low, high: minimum and maximum of the whole scan.

    Returns:
        No, one or two sentences.
    """
    values = np.sort(sample, axis=None).astype(np.float64)
    low, high = float(low), float(high)
    span = high - low
    if not span > 0 or len(values) < 4 * _FEWEST or not ((values > low) & (values < high)).any():
        return []  # also for a binary image, whose two values are both extremes
    notes = []
    fills = {
        "lowest": _describe_fill("lowest", low, values - low, span),
        "highest": _describe_fill("highest", high, (high - values)[::-1], span),
    }
    if fills["lowest"]:
        values = values[values > low]
        low = values[0]
    if fills["highest"]:
        values = values[values < high]
        high = values[-1]
    notes = [note for note in fills.values() if note]
    few = max(_FEWEST, len(values) // _FEW)
    if len(values) < 4 * few:
        return notes
    bottom, top = values[few], values[-1 - few]
    if top - bottom < _BULK * (high - low):
        side, edge = ("above", top) if high - top > bottom - low else ("below", bottom)
        notes.append(
            f"at most {100 * few / len(values):.2g} % of the voxels lie {side} {edge:g} and rule the intensity range, "
            f"{low:g} to {high:g}; clip them if they are artefacts"
        )
    return notes


def _describe_fill(name: str, extreme: float, distances: np.ndarray, span: float) -> str | None:
    """The note about a fill value; `distances` of the values from it, ascending."""
    count = int(np.searchsorted(distances, 0, side="right"))
    if count < _FILL * len(distances) or count == len(distances):
        return None
    gap = float(distances[count])
    following = np.diff(np.unique(distances[count:])[:100])
    if gap < _GAP * span or (len(following) and gap < _STEPS * np.median(following)):
        return None
    return (
        f"{100 * count / len(distances):.2g} % of the voxels have the {name} value, {extreme:g}, and the next one lies "
        f"{100 * gap / span:.2g} % of the intensity range away: a fill value outside the field of view changes the "
        "contrast within it; replace it by the value of air or background if it is one"
    )
