"""Analyze 7.5, SPM and two-file NIfTI pairs (`.hdr` and `.img`), by `nibabel`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.data.formats.nibabel_volume import open_image
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile
from diffdiscover3d.errors import InputError

NAME = "Analyze"
EXTRA = None
SUFFIXES = (".hdr", ".img", ".img.gz", ".hdr.gz")


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open a pair by either of its files.

    Raises:
        InputError: if one of them is missing or damaged.
    """
    import nibabel as nib

    gz = ".gz" if path.name.endswith(".gz") else ""
    base = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    header = path.with_name(f"{base}.hdr{gz}")
    for half in (header, path.with_name(f"{base}.img{gz}")):
        if not half.is_file():
            raise InputError(f"{name}: its other half {half.name} is missing; the two belong into one folder.")
    with nib.openers.ImageOpener(header) as file:
        start = file.read(348)
    # SPM's class reads plain Analyze 7.5 too, and scaling and origin where SPM wrote them
    kind = nib.Nifti1Pair if start[344:348] in (b"ni1\0", b"n+1\0") else nib.Spm2AnalyzeImage
    with open_image(path, name, options, kind, "Analyze") as volume:
        if kind is nib.Spm2AnalyzeImage and not path.with_name(f"{base}.mat").is_file():
            volume.notes.append(
                "Analyze files do not store which side is left: read as SPM writes them, from right to left"
            )
        yield volume
