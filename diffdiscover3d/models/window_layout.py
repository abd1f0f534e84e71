"""Windows that slide over a volume larger than memory: where they lie, how large they may be, what they take."""

import itertools
import math
from collections.abc import Mapping, Sequence

OVERLAP = 0.25  # of neighbouring windows, as a share of their side
BUDGET = 4 * 2**30  # bytes for the activations of one window and the sums of those that are not all in
_STEP, _SMALLEST = 16, 64  # voxels: windows are tried in steps of the first, down to the second
_READING = 200 * 2**20  # bytes in which slabs are read, measured and compressed


def hierarchy(network: Mapping) -> list[Mapping]:
    """The configurations of a discovery network and of those whose parts it divides, the coarsest first."""
    found = [network]
    while found[0].get("parent"):
        found.insert(0, found[0]["parent"])
    return found


def slides(shape: Sequence[int], network: Mapping) -> bool:
    """Whether a volume is too large to be taken at once by a network, or by one whose parts it divides.

    This alone decides which volumes `segment` divides slab by slab, so that a scan gets the same labels on every
    machine, however much memory is free.
    """
    return not all(taken_at_once(shape, config) for config in hierarchy(network))


def window_starts(length: int, window: int) -> list[int]:
    """First voxels of the windows along an axis, where MONAI's sliding window puts them.

    >>> window_starts(20, 8), window_starts(5, 8)
    ([0, 6, 12], [0])
    """
    if window >= length:
        return [0]
    step = max(1, int(window * (1 - OVERLAP)))
    return [min(i * step, length - window) for i in range(math.ceil((length - window) / step) + 1)]


def choose_window(shape: Sequence[int], network: Mapping) -> int:
    """The side of the windows in which a volume is divided; its longest one, if the network takes it at once.

    As near to the network's own as memory allows, since a window changes what a norm over its voxels sees: the own, if
    activations and sums stay in 4 GiB with it, otherwise the largest multiple of 16 with which they do, but at least
    64. What counts is the order of the axes that takes most, so that it does not matter how a scan is stored.

    Args:
        shape: of the volume, in voxels.
        network: the configuration of the discovery network; its parents do not count.
    """
    shape, own = shape[:3], network["window_size"]
    orders = set(itertools.permutations(shape))

    def takes(side: int) -> float:
        return max(window_bytes(order, side, network) for order in orders)

    if taken_at_once(shape, network):
        return max(shape)
    if takes(own) <= BUDGET:
        return own
    sides = range((own - 1) // _STEP * _STEP, _SMALLEST - 1, -_STEP)
    return next((side for side in sides if takes(side) <= BUDGET), min(own, _SMALLEST))


def window_bytes(shape: Sequence[int], window: int, network: Mapping) -> float:
    """Activations of one window, and the sums of all that overlap with windows still to come.

    Args:
        shape: as stored, the fastest axis first.
        window: side of the windows.
        network: the configuration of the discovery network.
    """
    width, height, depth = shape[:3]
    band = min(window, height) * min(window, depth) * width
    planes = shared_planes(window_starts(depth, window), min(window, depth)) * width * height
    return activation_bytes(shape, window, network) + 4 * network["num_parts"] * (band + planes)


def shared_planes(starts: Sequence[int], window: int) -> int:
    """The most voxels that two neighbouring windows share along an axis."""
    return max((a + window - b for a, b in itertools.pairwise(starts)), default=0)


def streaming_bytes(shape: Sequence[int], network: Mapping) -> float:
    """What dividing a volume slab by slab takes: of the network and those above it, the one that takes most."""
    return _READING + max(window_bytes(shape, choose_window(shape, c), c) for c in hierarchy(network))


def taken_at_once(shape: Sequence[int], network: Mapping) -> bool:
    """Whether a network takes a volume at once: if it has no more voxels than one of its windows."""
    return math.prod(map(float, shape[:3])) <= float(network["window_size"]) ** 3


def activation_bytes(shape: Sequence[int], window: int, network: Mapping) -> float:
    """The activations of a discovery network in one window of a volume, fitted to `benchmarks/results/memory.json`."""
    return math.prod(min(float(n), window) for n in shape[:3]) * 21 * network["channels"][0]
