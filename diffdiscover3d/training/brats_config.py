"""Training options for BraTS folders."""

import dataclasses
from dataclasses import dataclass

from diffdiscover3d.training.options import option


@dataclass(frozen=True)
class BraTSConfig:
    """Which volumes of a BraTS folder are used, and how they are prepared; see [`BraTSOptions`] for the defaults."""

    modality: str | None = option(None, "BraTS modality: flair (default), t1, t1ce or t2")
    grade: str | None = option(None, "grade of BraTS 2017 to 2019: HGG (default), LGG or all", ("HGG", "LGG", "all"))
    crop: tuple[int, ...] | None = option(None, "central crop of BraTS volumes, three integers (default: 200 200 155)")
    clip_percentiles: tuple[float, ...] | None = option(
        None, "clip BraTS intensities to these two percentiles of the tissue (default: no clipping)"
    )

    def __post_init__(self):
        for name in ("crop", "clip_percentiles"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def brats(self):
        """These options as [`load_volumes`] takes them.

        Raises:
            ValueError: if a value is invalid.
        """
        from diffdiscover3d.data.datasets.brats import BraTSOptions

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(BraTSConfig)}
        return BraTSOptions(**{name: value for name, value in given.items() if value is not None})
