"""MGH and MGZ files of FreeSurfer, by `nibabel`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.data.formats.nibabel_volume import open_image
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile

NAME = "MGH"
EXTRA = None
SUFFIXES = (".mgz", ".mgh", ".mgh.gz")


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open a volume, or one of several frames by `options.volume`.

    Raises:
        InputError: if it is damaged.
    """
    import nibabel as nib

    with open_image(path, name, options, nib.MGHImage, "MGH") as volume:
        yield volume
