"""MINC files of version 1 and 2, by `nibabel`; version 2 is HDF5 and needs `h5py`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.data.formats.nibabel_volume import open_image
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile, need

NAME = "MINC"
EXTRA = "medical"
SUFFIXES = (".mnc", ".mnc.gz")


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open a volume, or one of several frames by `options.volume`.

    Raises:
        InputError: if it is damaged.
    """
    import nibabel as nib

    def frame_axes(image: nib.Minc1Image) -> tuple[int, ...]:
        names = image.dataobj.minc_file._dim_names  # nibabel has no public name for them; time comes first
        return tuple(axis for axis, dimension in enumerate(names) if not dimension.endswith("space"))

    with open(path, "rb") as file:
        hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
    if hdf5:
        need("h5py", EXTRA, name)
    kind = nib.Minc2Image if hdf5 else nib.Minc1Image
    with open_image(path, name, options, kind, "MINC", frame_axes) as volume:
        yield volume
