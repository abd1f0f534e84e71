"""Layout of sliding windows: positions, side length and memory estimates."""

import itertools
import math
from collections.abc import Mapping, Sequence

OVERLAP = 0.25  # fraction of the side length shared by neighbouring windows
BUDGET = 4 * 2**30  # bytes for the activations of one window and the accumulators
_STEP, _SMALLEST = 16, 64  # voxels: step and lower bound of the search for a window side
_READING = 200 * 2**20  # bytes for reading, measuring and compressing slabs


def hierarchy(network: Mapping) -> list[Mapping]:
    """The configurations of a discovery network and its ancestors, coarsest first."""
    found = [network]
    while found[0].get("parent"):
        found.insert(0, found[0]["parent"])
    return found


def needs_sliding_window(shape: Sequence[int], network: Mapping) -> bool:
    """Whether a volume exceeds the window of a network or of one of its ancestors.

    This is the only criterion by which `segment` processes a volume slab by slab. It is independent of the free memory,
    so a scan gets the same labels on every machine.
    """
    return not all(fits_window(shape, config) for config in hierarchy(network))


def window_starts(length: int, window: int) -> list[int]:
    """First voxels of the windows along an axis, as in MONAI's `sliding_window_inference`.

    Equal to `monai.data.utils.dense_patch_slices`, which a test compares it with; kept because the memory needed is
    estimated before torch is imported, and importing MONAI takes seconds.

    >>> window_starts(20, 8), window_starts(5, 8)
    ([0, 6, 12], [0])
    """
    if window >= length:
        return [0]
    step = max(1, int(window * (1 - OVERLAP)))
    return [min(i * step, length - window) for i in range(math.ceil((length - window) / step) + 1)]


def choose_window(shape: Sequence[int], network: Mapping) -> int:
    """The side length of the sliding windows, or the longest side of the volume if it fits into one window.

    The network's own `window_size` is used if activations and accumulators fit into 4 GiB, otherwise the largest
    multiple of 16 that fits, but at least 64. Larger windows are preferred because instance norm depends on the window.
    The memory is estimated for the least favourable order of the axes, so the result does not depend on the storage
    order of a scan.

    Args:
        shape: shape of the volume, in voxels.
        network: configuration of the discovery network; its parents are ignored.
    """
    shape, own = shape[:3], network["window_size"]
    orders = set(itertools.permutations(shape))

    def memory(side: int) -> float:
        return max(window_bytes(order, side, network) for order in orders)

    if fits_window(shape, network):
        return max(shape)
    if memory(own) <= BUDGET:
        return own
    sides = range((own - 1) // _STEP * _STEP, _SMALLEST - 1, -_STEP)
    return next((side for side in sides if memory(side) <= BUDGET), min(own, _SMALLEST))


def window_bytes(shape: Sequence[int], window: int, network: Mapping) -> float:
    """Bytes for the activations of one window and the accumulators of incomplete rows and planes.

    Args:
        shape: shape as stored, fastest axis first.
        window: side length of the windows.
        network: configuration of the discovery network.
    """
    width, height, depth = shape[:3]
    band = min(window, height) * min(window, depth) * width
    planes = shared_planes(window_starts(depth, window), min(window, depth)) * width * height
    return activation_bytes(shape, window, network) + 4 * network["num_parts"] * (band + planes)


def shared_planes(starts: Sequence[int], window: int) -> int:
    """The maximum overlap of two neighbouring windows along an axis, in voxels."""
    return max((a + window - b for a, b in itertools.pairwise(starts)), default=0)


def streaming_bytes(shape: Sequence[int], network: Mapping) -> float:
    """Peak bytes of slab-by-slab inference, the maximum over the network and its ancestors."""
    return _READING + max(window_bytes(shape, choose_window(shape, c), c) for c in hierarchy(network))


def fits_window(shape: Sequence[int], network: Mapping) -> bool:
    """Whether a volume has at most as many voxels as one window of the network."""
    return math.prod(map(float, shape[:3])) <= float(network["window_size"]) ** 3


def activation_bytes(shape: Sequence[int], window: int, network: Mapping) -> float:
    """Bytes for the activations of one window, from a fit to `benchmarks/results/memory.json`."""
    return math.prod(min(float(n), window) for n in shape[:3]) * 21 * network["channels"][0]
