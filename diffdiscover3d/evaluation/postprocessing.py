"""The cleaning of a mask that is reported beside every method alike, since it alone can divide HD95 by five."""

import numpy as np
from scipy import ndimage


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """Keep the largest component (neighbours by face, edge or corner), fill its holes, smooth it by a 3³ median.

    Args:
        mask: (H, W, D), anything that is not 0 counts.

    Returns:
        (H, W, D) bool; empty if `mask` is.
    """
    mask = np.asarray(mask) != 0
    if not mask.any():
        return mask
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = components == sizes.argmax()  # of equal ones the first
    # all that follows stays within the component's box and one voxel around it
    box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in ndimage.find_objects(largest.astype(np.uint8))[0])
    out = np.zeros_like(mask)
    out[box] = ndimage.median_filter(ndimage.binary_fill_holes(largest[box]).astype(np.uint8), size=3, mode="constant")
    return out
