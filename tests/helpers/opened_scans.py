"""Volumes that are opened for reading by regions, and closed again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdiscover3d.data.formats.nifti.slabs import SlabScan, stream_volume
from diffdiscover3d.data.formats.nifti.source import open_nifti
from diffdiscover3d.data.formats.reading import open_source, stream_source
from diffdiscover3d.data.formats.registry import options_in


@contextmanager
def open_slabs(path: str | Path, scratch: str | Path, **reading) -> Iterator[SlabScan]:
    """A `.nii` or `.nii.gz` file, with the options of [`stream_volume`]."""
    with open_nifti(path) as file, stream_volume(file, scratch, **reading) as scan:
        yield scan


@contextmanager
def open_scan(path: str | Path, scratch: str | Path, **reading) -> Iterator[SlabScan]:
    """A volume of any format, with the options of [`open_source`] and [`stream_source`]."""
    reading |= options_in(path)
    with open_source(path, **reading) as source, stream_source(source, scratch, **reading) as scan:
        yield scan
