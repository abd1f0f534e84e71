"""Uploaded files as one volume: their names, zip archives, and references to files that were not uploaded."""

import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.formats.registry import NAMES, SEPARATOR, is_volume
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.files import output_errors

UNPACKED = 8  # a volume may take so many times the limit of an upload once it is uncompressed
_MAX_MEMBERS = 100_000
_HEADER_BYTES = 2**20  # the text headers of NRRD and MetaImage are far shorter
_UNSAFE = re.compile(r"[^\w.+=@,() -]")
_DATA_FILE = re.compile(rb"(?:ElementDataFile|(?i:data ?file))[ \t]*[:=]+[ \t]*([^\r\n]*)")
_HEADER_END = re.compile(rb"(?m)^[ \t]*ElementDataFile[ \t]*[:=]|\n\r?\n")  # of MetaImage, of NRRD
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def arrange_uploads(files: Sequence[Path], folder: Path, max_bytes: int, inner: str = "") -> Path:
    """Put uploaded files into a folder of their own, and find the one volume that they hold.

    Several files are those of one volume: the images of a DICOM series, or a header and its data. A zip archive is
    unpacked; it holds a DICOM series or a Zarr store.

    Args:
        files: the uploads.
        folder: to be created.
        max_bytes: limit of the size of all files, and of [`UNPACKED`] times that for the contents of an archive.
        inner: name of one of several arrays in an HDF5, npz or Zarr file.

    Returns:
        The path of the volume, as `data/formats/registry.py` describes it.

    Raises:
        InputError: if the files are no volume or several, too large, or refer to files beyond themselves.
    """
    if not files:
        raise InputError("there is no volume yet: upload one, or take a demo.")
    check_size(sum(path.stat().st_size for path in files), max_bytes)
    folder.mkdir()
    names = [safe_name(path.name) for path in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{twice}: several uploads have this name; put their folder into a zip archive.")
    if len(files) == 1 and names[0].lower().endswith(".zip"):
        place = folder / (names[0][: -len(".zip")] or "upload")
        unpack(files[0], place, max_bytes * UNPACKED)
    else:
        place = folder if len(files) > 1 else folder / names[0]
        for path, name in zip(files, names, strict=True):
            _link(path, folder / name)
    refuse_references(folder)
    return _only_volume(place, inner)


def check_size(size: int, max_bytes: int) -> None:
    """Refuse uploads that are too large.

    Raises:
        InputError: with both sizes.
    """
    if size > max_bytes:
        shown = f"{size / 2**20:.1f} MB; the limit of this app is {max_bytes / 2**20:.0f} MB"
        raise InputError(f"the upload has {shown}. `diffdiscover3d segment` has no limit.")


def safe_name(name: str) -> str:
    """A file name without separators and characters that mean something in paths of this package.

    >>> safe_name("../a::b*.nii.gz"), safe_name("scan (1).nii.gz")
    ('a__b_.nii.gz', 'scan (1).nii.gz')
    """
    plain = _UNSAFE.sub("_", Path(name.replace("\\", "/")).name)
    return plain.lstrip(".") or "upload"


def unpack(archive: Path, folder: Path, max_bytes: int) -> None:
    """Unpack a zip archive into a new folder.

    Raises:
        InputError: if it is damaged, encrypted, too large, or has members with a path outside the folder.
    """
    name = archive.name
    try:
        with zipfile.ZipFile(archive) as opened, output_errors(folder):
            members = [member for member in opened.infolist() if not member.is_dir()]
            if len(members) > _MAX_MEMBERS:
                raise InputError(f"{name}: holds {len(members):,} files; at most {_MAX_MEMBERS:,} are accepted.")
            if (size := sum(member.file_size for member in members)) > max_bytes:
                sizes = f"{size / 2**20:.0f} MB once unpacked; the limit is {max_bytes / 2**20:.0f} MB"
                raise InputError(f"{name}: has {sizes}. `diffdiscover3d segment` has no limit.")
            for member in members:
                path = Path(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or SEPARATOR in member.filename:
                    raise InputError(f"{name}: holds a file with the path {member.filename!r}; zip the folder itself.")
                opened.extract(member, folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        reason = "is encrypted" if "password" in str(error) else f"is no zip archive or a damaged one ({error})"
        raise InputError(f"{name}: {reason}; zip the folder again.") from error


def refuse_references(folder: Path) -> None:
    """Refuse files that refer to data by a path: they could show other files of this machine.

    NRRD and MetaImage headers, HDF5 (external links, external and virtual datasets) and OME-TIFF can do so. In headers
    and OME-TIFF, names without a folder are accepted, since they mean files that were uploaded together.

    Args:
        folder: of uploaded files and nothing else.

    Raises:
        InputError: with the reference.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for reference in _references(path):
            if reference != Path(reference).name or "\\" in reference:
                raise InputError(
                    f"{path.name}: refers to another file by a path, {reference[:200]!r}; "
                    "upload a file that holds its own voxels."
                )


def _references(path: Path) -> list[str]:
    """The names of other files in a file; HDF5 with any is refused."""
    with open(path, "rb") as file:
        start = file.read(_HEADER_BYTES)
    found = []
    if path.suffix.lower() in (".nrrd", ".nhdr", ".mha", ".mhd") or start.startswith(b"NRRD"):
        if len(start) == _HEADER_BYTES and not _HEADER_END.search(start):
            raise InputError(f"{path.name}: has a header of more than {_HEADER_BYTES:,} bytes; convert it again.")
        found = [value.decode(errors="replace").strip() for value in _DATA_FILE.findall(start)]
        if any(value.upper().startswith("LIST") for value in found):
            raise InputError(f"{path.name}: lists several data files; upload a file that holds its own voxels.")
    if start.startswith(_TIFF_STARTS):
        found += _tiff_references(path)
    _refuse_hdf5_references(path)
    return [value for value in found if value.upper() != "LOCAL"]


def _tiff_references(path: Path) -> list[str]:
    try:
        import tifffile

        with tifffile.TiffFile(path) as file:
            metadata = file.ome_metadata
        tree = ElementTree.fromstring(metadata) if metadata else None
    except Exception:  # without the library or with a damaged file, reading it reports the reason
        return []
    elements = tree.iter() if tree is not None else ()
    return [value for e in elements for key, value in e.attrib.items() if key in ("FileName", "MetadataFile")]


def _refuse_hdf5_references(path: Path) -> None:
    try:
        import h5py

        if not h5py.is_hdf5(path):
            return
        file = h5py.File(path, "r")
    except (ImportError, OSError):  # reading it reports the reason
        return
    found: list[str] = []

    def look(name: str, link) -> None:
        if isinstance(link, h5py.ExternalLink):
            found.append(link.filename)
        elif isinstance(link, h5py.HardLink) and isinstance(item := file[name], h5py.Dataset):
            found.extend(external[0] for external in item.external or ())
            if item.is_virtual:
                found.extend(source.file_name for source in item.virtual_sources() if source.file_name != ".")

    with file:
        file.visititems_links(look)
    if found:  # HDF5 looks for a name without a folder in the working directory, too
        raise InputError(f"{path.name}: takes data from another file, {found[0]!r}; upload a file that holds its own.")


def _only_volume(place: Path, inner: str) -> Path:
    """The one volume of the uploads, with the name of an array in it behind it."""
    if place.is_file():
        if not is_volume(place):
            raise InputError(f"{place.name}: is no volume of a known format; give a {NAMES} file.")
        volume = place
    else:
        found = list_volumes(place)
        if len(found) > 1:
            listed = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
            raise InputError(f"the upload holds {len(found)} volumes ({listed}); upload one.")
        volume = found[0]
    if not inner:
        return volume
    if "@" in inner or SEPARATOR in str(volume):
        raise InputError(f"{inner}: is no name of an array in {volume.name}.")
    return Path(f"{volume}{SEPARATOR}{inner}")


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, so that large uploads are not copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
