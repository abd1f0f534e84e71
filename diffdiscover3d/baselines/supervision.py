"""How many labels a method is given, and losses that use no others."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

HIDDEN = -1  # the label of a voxel whose label is not given
AMOUNTS = ("none", "slice", "volume", "all")
# pairs of parts that differ in nothing but their numbers: two proteins of the same kind in the synthetic cells
EXCHANGEABLE: dict[int, tuple[tuple[int, int], ...]] = {8: ((4, 5), (6, 7))}


class LimitedLabels(Sequence):
    """Training volumes with the labels that a method is allowed, and no others.

    Items are `{"volume", "name"}` and, unless the amount is "none", `"labels"`: (H, W, D) int64, [`HIDDEN`] where the
    label is not given.

    Args:
        volumes: items with "volume" and "name".
        labels: gives the (H, W, D) true parts of a volume by its index; called only where labels are given.
        amount: "none"; "slice": one random plane of each volume, orthogonal to the first, second and third axis in
            turn, 2 % of 50³ voxels; "volume": all voxels of one random volume; "all".
        seed: of the choice of planes or of the volume.
        planes: range of the planes' positions as fractions of the side.

    Raises:
        ValueError: for an unknown amount.
    """

    def __init__(
        self,
        volumes: Sequence[dict],
        labels: Callable[[int], torch.Tensor],
        amount: str,
        seed: int = 0,
        planes: tuple[float, float] = (0.1, 0.9),
    ):
        if amount not in AMOUNTS:
            raise ValueError(f"`amount` must be one of {AMOUNTS}, got {amount!r}.")
        self.volumes, self.amount, self._labels = volumes, amount, labels
        generator = torch.Generator().manual_seed(seed)
        low, high = planes
        self._planes = (low + (high - low) * torch.rand(len(volumes), generator=generator)).tolist()
        self.labelled_volume = int(torch.randint(len(volumes), (1,), generator=generator))
        self._given: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = self.volumes[index]
        found = {"volume": item["volume"], "name": item["name"]}
        if self.amount != "none":
            if index not in self._given:
                self._given[index] = self._reveal(index, tuple(item["volume"].shape[1:]))
            found["labels"] = self._given[index]
        return found

    def share(self) -> float:
        """Fraction of the voxels whose label is given."""
        if self.amount in ("none", "all"):
            return float(self.amount == "all")
        given = [(self[i]["labels"] != HIDDEN).double().mean() for i in range(len(self))]
        return float(torch.stack(given).mean())

    def _reveal(self, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        given = torch.full(shape, HIDDEN, dtype=torch.int64)
        if self.amount == "slice":
            axis = index % 3
            position = int(self._planes[index] * shape[axis])
            given.select(axis, position).copy_(self._labels(index).select(axis, position).long())
        elif self.amount == "all" or index == self.labelled_volume:
            given = self._labels(index).long()
        return given


def class_weights(volumes: Sequence[dict], num_parts: int, limit: float = 20.0) -> torch.Tensor:
    """Weights (K,) for a cross-entropy, inverse to the square root of each part's share of the given labels.

    Parts of no given voxel have weight 0. Weights average 1 over the given voxels; the largest is at most `limit`
    times the smallest.
    """
    counts = torch.zeros(num_parts, dtype=torch.float64)
    for i in range(len(volumes)):
        labels = volumes[i]["labels"]
        counts += torch.bincount(labels[labels != HIDDEN].flatten(), minlength=num_parts).double()
    weights = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
    smallest = weights[counts > 0].min()
    weights = weights.clamp(max=smallest * limit)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def sparse_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy of each volume over the voxels whose label is given (Çiçek et al., MICCAI 2016).

    Args:
        logits: (B, K, H, W, D).
        labels: (B, H, W, D) int64, [`HIDDEN`] where the label is not given: such voxels have weight 0.
        weights: (K,) of the parts.

    Returns:
        (B,), 0 for a volume without labels.
    """
    voxelwise = F.cross_entropy(logits.float(), labels, weights, ignore_index=HIDDEN, reduction="none")
    given = torch.where(labels == HIDDEN, 0.0, weights[labels.clamp(min=0)])
    return voxelwise.flatten(1).sum(dim=1) / given.flatten(1).sum(dim=1).clamp(min=1e-6)


def numberings(num_parts: int) -> list[torch.Tensor]:
    """The renumberings (K,) of the parts that differ only in which of two exchangeable parts has which number."""
    found = []
    pairs = EXCHANGEABLE.get(num_parts, ())
    for swaps in itertools.product((False, True), repeat=len(pairs)):
        numbers = torch.arange(num_parts)
        for (a, b), swapped in zip(pairs, swaps, strict=True):
            if swapped:
                numbers[a], numbers[b] = b, a
        found.append(numbers)
    return found


def best_numbering_loss(
    loss: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, num_parts: int
) -> torch.Tensor:
    """The mean over volumes of a loss under the numbering of exchangeable parts that fits each volume best.

    The scores match parts in the same way. Under a fixed numbering, which of two like proteins comes first is random,
    and the network predicts neither.

    Args:
        loss: maps (B, H, W, D) labels to the loss of each volume, (B,).
        labels: (B, H, W, D) int64, [`HIDDEN`] where the label is not given.
    """
    candidates = []
    for numbers in numberings(num_parts):
        renumbered = torch.where(labels == HIDDEN, HIDDEN, numbers.to(labels.device)[labels.clamp(min=0)])
        candidates.append(loss(renumbered))
    return torch.stack(candidates).min(dim=0).values.mean()
