"""A folder, glob or text list of NIfTI files as a dataset."""

import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d.data.formats.nifti.header import SUFFIXES, check_reachable
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import InputError

if TYPE_CHECKING:
    import torch

_CACHE_BYTES = 4 * 2**30  # maximum size of the volumes of a dataset kept in memory
_END_BYTES = 4096


def list_volumes(source: str | Path) -> list[Path]:
    """List NIfTI files, sorted by path.

    Args:
        source: a folder (searched recursively), a glob pattern, a text file with one path per line (relative to that
            file; empty lines and comments starting with # are ignored), or a NIfTI file.

    Raises:
        InputError: if no file is found, or a listed file does not exist.
    """
    path = Path(source)
    check_reachable(path)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)]
        # skip hidden folders, which include staging folders, also those of killed processes
        found = [p for p in found if not _is_hidden(p.relative_to(path)) and not _is_label_map(p)]
    elif path.is_file() and path.name.endswith(SUFFIXES):
        found = [path]
    elif path.is_file():
        found = _read_list(path)
    else:
        found = [Path(p) for p in glob.glob(str(source), recursive=True) if p.endswith(SUFFIXES)]
    if not found:
        raise InputError(f"{source}: no .nii or .nii.gz files; give a folder, a glob, a text list or a file.")
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_label_map(path: Path) -> bool:
    """Whether a file is a label map or probability map written by this package."""
    return path.name.removesuffix(".gz").removesuffix(".nii").endswith(("_dseg", "_probseg"))


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{path}: neither a NIfTI file nor a text list of them ({error}); give a .nii or .nii.gz."
        raise InputError(reason) from error
    names = [line.split("#")[0].strip() for line in lines]
    found = [path.parent / name for name in names if name]
    # os.path.isfile returns False for names that are too long, for which Path.is_file raises
    missing = [p for p in found if not os.path.isfile(p)]
    if missing:
        raise InputError(
            f"{path}: lists {len(missing)} file(s) that do not exist, first {str(missing[0])[:200]}; "
            "correct the list, or give a NIfTI file."
        )
    return found


def files_fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """The sha256 over names, sizes, and the first and last 4 KiB of files, in the given order."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_END_BYTES)
            file.seek(max(0, size - _END_BYTES))
            ends = head + file.read(_END_BYTES)
        digest.update(f"{name}\0{size}\0".encode() + hashlib.sha256(ends).digest())
    return digest.hexdigest()


class VolumeFolder:
    """Sequence of NIfTI volumes in canonical orientation, min-max normalised.

    Items are `{"volume": (1, H, W, D) float32 in [0, 1], "name": str}`. Volumes are kept in memory after the first
    access, up to 4 GiB in total.

    Attributes:
        paths: paths of the files, sorted.
        shapes: shapes of the volumes; `None` until set by [`read_all`].

    Raises:
        InputError: on construction, if there are no volumes; on access, if a volume cannot be read.
    """

    def __init__(self, source: str | Path):
        self.paths = list_volumes(source)
        self.shapes: list[tuple[int, ...]] | None = None
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """The sha256 over names, sizes, and the first and last 4 KiB of the files.

        It includes the checksum at the end of each `.nii.gz` file, and does not depend on the path of the folder.
        """
        return files_fingerprint((path.name, path) for path in self.paths)

    def __getitem__(self, index: int) -> dict:
        import torch  # lazy, because listing files does not need torch

        from diffdiscover3d.data.transforms import min_max_normalize

        volume = self._cache.get(index)
        if volume is None:
            volume = min_max_normalize(torch.from_numpy(read_nifti(self.paths[index]).data)[None])
            if self._cached_bytes + volume.nbytes <= _CACHE_BYTES:
                self._cache[index] = volume
                self._cached_bytes += volume.nbytes
        return {"volume": volume, "name": self.paths[index].name}
