"""What is in a folder on the disk, links and special files included, and what a list names."""

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.data.formats import ome_zarr
from diffdiscover3d.data.formats.nifti.header import DANGLING, special_kind
from diffdiscover3d.data.formats.registry import NAMES, format_by_name, is_nifti, split
from diffdiscover3d.errors import InputError


def walk(folder: Path, barred: list[tuple[Path, str]]) -> Iterator[Path]:
    """Files, and folders that are Zarr stores; hidden ones hold what is being written, or was when it was killed.

    Links to folders are followed after all others, so that a folder that is reached in two ways keeps its own name.

    Args:
        folder: where to begin.
        barred: extended by what cannot be looked into, and links and special files that are no volumes, with reasons.
    """

    def note(error: OSError) -> None:
        barred.append((Path(error.filename), f"a folder that cannot be searched ({error.strerror})"))

    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        for root, folders, names in os.walk(waiting.pop(0), onerror=note):
            place = Path(root)
            identity = (place.stat().st_dev, place.stat().st_ino)
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            if not os.access(place, os.X_OK):
                barred.append((place, "a folder that cannot be searched (Permission denied)"))
                folders.clear()
                continue
            shown = [n for n in folders if not n.startswith(".")]
            stores = [n for n in shown if _is_store(place / n)]
            folders[:] = sorted(n for n in shown if n not in stores)
            waiting += [place / n for n in folders if (place / n).is_symlink()]
            for path in (place / n for n in sorted([*stores, *names]) if not n.startswith(".")):
                if (reason := _fault_of_entry(path)) is None:
                    yield path
                else:
                    barred.append((path, reason))


def _is_store(folder: Path) -> bool:
    with contextlib.suppress(PermissionError):
        return ome_zarr.is_store(folder)
    return False


def _fault_of_entry(path: Path) -> str | None:
    """Why something in a folder is not even looked at; a dangling link named like a volume is left to its reader."""
    try:
        kind = special_kind(path)
    except OSError:
        named = is_nifti(path) or format_by_name(path) is not None
        return None if named else DANGLING if path.is_symlink() else "cannot be looked up"
    return kind


def read_list(path: Path) -> list[Path]:
    """The paths in a list, JSON or text. A line of text may end in a comment behind #, unless it names a file as it is.

    Raises:
        InputError: if it is no list, or a listed file does not exist.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".json":  # for names that a text list cannot hold
            names = json.loads(content)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("not a list of paths")
            found = [path.parent / name for name in names if name]
        else:
            lines = re.split(r"\r\n|\r|\n", _decode(content))
            found = [place for line in lines if (place := _listed(path.parent, line)) is not None]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: neither a volume nor a list of them ({error}); give a {NAMES} file.") from error
    # unlike Path.exists, os.path answers for names too long to be one: the file may be no list at all
    missing = [p for p in found if not os.path.lexists(split(p)[0])]
    if missing:
        raise InputError(
            f"{path}: lists {len(missing)} file(s) that do not exist, first {str(missing[0])[:200]}; "
            "mend the list, or give a volume."
        )
    return found


def _decode(content: bytes) -> str:
    """A list as text: UTF-8 or UTF-16 with or without a byte order mark; other bytes are kept, as in file names.

    Raises:
        UnicodeError: if it is no text.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    if "\0" in text:
        raise UnicodeError("it holds binary data")
    return text


def _listed(folder: Path, line: str) -> Path | None:
    """The file that a line of a list names, `None` for an empty line or a comment.

    A name with # or blanks at its ends is taken as it is if there is such a file. Bytes that are not UTF-8 are those of
    the name, or else Latin-1.
    """
    plain = line.split("#")[0].strip()
    for name in (line, line.strip(), plain):
        if not name.strip():
            continue
        latin = "".join(chr(ord(c) - 0xDC00) if "\udc80" <= c <= "\udcff" else c for c in name)
        for spelled in (name, latin):
            if os.path.lexists(split(folder / spelled)[0]):
                return folder / spelled
    return folder / plain if plain else None
