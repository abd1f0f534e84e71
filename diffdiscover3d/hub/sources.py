"""Where the files of a model are, found without loading it; nothing here imports torch."""

import contextlib
from pathlib import Path

from diffdiscover3d.errors import ModelError, OutputError
from diffdiscover3d.hub.download import is_repo_id
from diffdiscover3d.models.embedded import embedded_models, nested_levels
from diffdiscover3d.utils.staging import recover_folder


def model_levels(name: str) -> tuple[int, ...]:
    """The levels of an embedded model or of a folder with a nested network; none for a single network or a Hub id."""
    embedded = embedded_models()
    if name in embedded:
        return embedded[name].levels
    config = find_model(Path(name)) / "config.json"
    levels = nested_levels(config) if config.is_file() else ()
    return levels if len(levels) > 1 else ()


def find_model(folder: Path, part: str = "discovery", marker: str = "config.json") -> Path:
    """The folder of one model: `discover` and the embedded models keep two in one folder.

    Args:
        folder: of the model, or of both.
        part: the subfolder of the wanted one, "discovery" or "diffusion".
        marker: a file that the folder of the wanted model holds.
    """
    if not folder.exists():  # of a killed `pull --overwrite`, where folders cannot be exchanged in one step
        with contextlib.suppress(OutputError):
            recover_folder(folder.parent)
    inside = folder / part
    return inside if not (folder / marker).is_file() and (inside / marker).is_file() else folder


def check_source(kind: str, folder: Path, name: str, marker: str, revision: str | None) -> None:
    """Refuse a name that is neither a model folder nor a Hub id, before anything is loaded or fetched.

    Args:
        kind: name of the class to be loaded.
        folder: `name` as a path; the folder of the model itself, if it is one.
        name: as the user gave it.
        marker: file that the folder must hold.
        revision: only a Hub id may have one.

    Raises:
        ModelError: if it cannot be a source of this model.
    """
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise ModelError(f"{name}: no {kind} in this folder ({marker} is missing).")
        if revision:
            raise ModelError(f"{name}: a folder has no revisions; --revision goes with a Hub id.")
    elif not is_repo_id(name):
        known = ", ".join(embedded_models())
        raise ModelError(f"{name!r}: no such folder, and no Hub id (user/name); embedded models: {known}.")
