"""Columns of volumes for the `datasets` library.

Requires the extra `datasets`.
"""

from dataclasses import dataclass
from typing import ClassVar

import datasets
import nibabel as nib
import numpy as np
from datasets.features.nifti import Nifti1ImageWrapper

from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor

VOLUME = "volume"  # the name of the column in every dataset of this package


class VolumeImage(Nifti1ImageWrapper):
    """A NIfTI image that the formats "torch" and "numpy" of `datasets` convert, in RAS+ orientation."""

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """(H, W, D) float32 intensities."""
        array = as_volume_tensor(self.nifti_image)[0, 0].numpy()
        return array if dtype is None else array.astype(dtype)


class LabelImage(VolumeImage):
    """The same for a label map."""

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """(H, W, D) int64 labels."""
        image = nib.as_closest_canonical(self.nifti_image)
        return np.asarray(image.dataobj).reshape(image.shape[:3]).astype(np.int64 if dtype is None else dtype)


@dataclass
class VolumeColumn(datasets.Nifti):
    """A `Nifti` column whose images can be formatted as tensors. Stored datasets have plain `Nifti` columns."""

    image: ClassVar[type] = VolumeImage

    def decode_example(self, value, token_per_repo_id=None):
        """See `datasets.Nifti.decode_example`."""
        found = super().decode_example(value, token_per_repo_id)
        return found if isinstance(found, VolumeImage) else self.image(found.nifti_image)


@dataclass
class LabelColumn(VolumeColumn):
    """The same for label maps."""

    image: ClassVar[type] = LabelImage


def with_formats(dataset):
    """Let the `Nifti` columns of a dataset be formatted as tensors, in place.

    Args:
        dataset: a `Dataset` or `IterableDataset`, or a dict of them.
    """
    for one in dataset.values() if isinstance(dataset, dict) else [dataset]:
        features = one.info.features
        for name, feature in features.items():
            if type(feature) is datasets.Nifti:
                features[name] = LabelColumn() if name in ("labels", "whole_tumour") else VolumeColumn()
    return dataset
