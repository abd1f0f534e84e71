"""Mask post-processing, evaluated for every method because it alone can reduce HD95 by a factor of five."""

import numpy as np
from scipy import ndimage


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """Keep the largest component (26-connectivity), fill its holes and apply a 3³ median filter.

    Args:
        mask: (H, W, D), nonzero inside the mask.

    Returns:
        (H, W, D) bool; empty if `mask` is.
    """
    # By scipy: MONAI's KeepLargestConnectedComponent needs scikit-image, its MedianSmooth repeats the voxels at the
    # border of the volume, and these two and FillHoles work on the whole volume, which is slower.
    mask = np.asarray(mask) != 0
    if not mask.any():
        return mask
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = components == sizes.argmax()  # the first of equally large components
    # the remaining steps change only the bounding box of the component and one voxel around it
    box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in ndimage.find_objects(largest.astype(np.uint8))[0])
    out = np.zeros_like(mask)
    out[box] = ndimage.median_filter(ndimage.binary_fill_holes(largest[box]).astype(np.uint8), size=3, mode="constant")
    return out
