"""Checksums of the files of a model folder, written beside them and verified when the model is loaded."""

from collections.abc import Iterable
from pathlib import Path

from diffdiscover3d.errors import ModelError
from diffdiscover3d.utils.files import read_model_json, sha256, write_json

CHECKSUMS_NAME = "checksums.json"


def write_checksums(folder: str | Path, patterns: Iterable[str]) -> None:
    """Write `checksums.json`: the sha256 of every file of the folder that matches one of the glob patterns."""
    folder = Path(folder)
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    write_json(folder / CHECKSUMS_NAME, {"sha256": {p.relative_to(folder).as_posix(): sha256(p) for p in files}})


def update_checksums(folder: str | Path) -> None:
    """Write the checksums of a folder and its subfolders anew, for the same files, after these have been changed."""
    for path in Path(folder).rglob(CHECKSUMS_NAME):
        write_checksums(path.parent, _listed(path))


def verify_checksums(folder: str | Path) -> None:
    """Compare the files of a model folder with its `checksums.json`; a folder without one is not checked.

    Raises:
        ModelError: if a listed file is missing or has changed, or the list itself is damaged.
    """
    folder = Path(folder)
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return
    for name, expected in _listed(path).items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file}: is missing, but {CHECKSUMS_NAME} lists it; fetch or train the model again.")
        if sha256(file) != expected:
            raise ModelError(
                f"{file}: does not have the sha256 that {CHECKSUMS_NAME} lists, so it is damaged or was edited; fetch "
                f"the model again, or delete {CHECKSUMS_NAME} if you changed the file yourself."
            )


def _listed(path: Path) -> dict[str, str]:
    listed = read_model_json(path).get("sha256")
    valid = isinstance(listed, dict) and listed and all(isinstance(value, str) for value in listed.values())
    if not valid or any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed):
        raise ModelError(f"{path}: must map file names to their sha256; fetch or train the model again.")
    return listed
