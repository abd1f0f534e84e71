"""BraTS volumes for training and evaluation: cropped, normalised and cached."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.cache import CachedVolumes
from diffdiscover3d.data.content_hashes import content_hashes
from diffdiscover3d.data.datasets.brats import (
    BraTSOptions,
    crop_box,
    find_cases,
    prepare,
    read_image,
    read_mask,
    split_cases,
    true_parts,
)
from diffdiscover3d.errors import InputError

_CACHE_VERSION = 2  # increment when the cached content changes


class BraTSVolumes(Sequence):
    """Sequence of the cases of a split. The split "all" has every case, for models that were trained on none of them.

    Items are `{"volume": (1, h, w, d) float32 in [0, 1], "name": id, "spacing_mm": [x, y, z]}` on the cropped grid.

    Attributes:
        cases: the cases of this split, sorted by id.
        split_ids: the ids of all splits, saved with every result.

    Raises:
        InputError: on construction, if there are no cases or a file of the modality is missing; on access, if a file is
            damaged.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        options: BraTSOptions | None = None,
        cache: str | Path | None = None,
    ):
        self.options = options or BraTSOptions()
        splits = split_cases(find_cases(root, self.options.grade), self.options.split_seed)
        splits["all"] = sorted((case for side in splits.values() for case in side), key=lambda case: case.id)
        if split not in splits:
            raise ValueError(f"`split` must be one of {tuple(splits)}, got {split!r}.")
        if split != "all":
            del splits["all"]
        self.cases = splits[split]
        self.split_ids = {name: [case.id for case in side] for name, side in splits.items()}
        files = [case.image(self.options.modality) for case in self.cases]  # fail fast on missing files
        self._sha256 = content_hashes(files, None if cache is None else Path(cache) / "sha256")
        chosen = [self.options.modality, self.options.crop, self.options.clip_percentiles]
        self._items = CachedVolumes(len(self.cases), self._make, [_CACHE_VERSION, chosen, self._sha256], cache)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict:
        return self._items[index]

    def fingerprint(self) -> str:
        """Fingerprint of the ids of all splits and of the files of this split, independent of their location."""
        listed = [[case.id, digest] for case, digest in zip(self.cases, self._sha256, strict=True)]
        files = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return f"BraTS {hashlib.sha256(json.dumps(self.split_ids).encode()).hexdigest()} {files}"

    def require_masks(self) -> None:
        """Raise InputError if a case has no mask."""
        for case in self.cases:
            case.require_mask()

    def true_parts(self, index: int) -> np.ndarray:
        """Reference parts on the uncropped grid: (H, W, D) uint8 with 0 background, 1 brain, 2 whole tumour.

        Raises:
            InputError: if the case has no mask, or its shape differs from the image.
        """
        image = read_image(self.cases[index], self.options.modality).data
        return true_parts(image, read_mask(self.cases[index], image.shape))

    def crop(self, array: np.ndarray) -> np.ndarray:
        """Crop an array on the uncropped grid."""
        return array[crop_box(array.shape, self.options.crop)]

    def uncrop(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Zero-pad an array on the cropped grid to the uncropped grid."""
        whole = np.zeros(tuple(shape), dtype=array.dtype)
        whole[crop_box(shape, self.options.crop)] = array
        return whole

    def _make(self, index: int) -> dict:
        case = self.cases[index]
        image = read_image(case, self.options.modality)
        if image.sha256 != self._sha256[index]:
            raise InputError(
                f"{case.image(self.options.modality)}: has changed since it was listed; run again when it is no longer "
                "written to."
            )
        volume = prepare(image.data, self.options, case.id)
        return {"volume": torch.from_numpy(volume)[None], "name": case.id, "spacing_mm": list(image.spacing_mm)}
