"""Find models: the embedded ones by name, others by folder or Hub id; push them, pull them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging

from diffdiscover3d.errors import ModelError, NetworkError, OutputError, first_line
from diffdiscover3d.hub.cards import folder_kind
from diffdiscover3d.hub.download import fetch_snapshot, is_data_file
from diffdiscover3d.hub.sources import check_source, find_model
from diffdiscover3d.hub.upload import push_folder
from diffdiscover3d.models.embedded import DEFAULT_MODEL as DEFAULT_MODEL
from diffdiscover3d.models.embedded import embedded_models
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.utils.files import check_folder
from diffdiscover3d.utils.staging import recover_folder, replaced_folder

_MODEL_CLASSES = {"diffusion": DiffusionFeaturePipeline, "discovery": StructureDiscoveryModel, "unet": UNet3DModel}


def load_teacher(name: str, revision: str | None = None) -> DiffusionFeaturePipeline:
    """Load a diffusion model as a feature pipeline.

    Args:
        name: the name of an embedded model, a folder written by the diffusion training, or a Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ModelError: if there is no such model, or it is damaged.
        NetworkError: if the Hub cannot be reached.
    """
    embedded = embedded_models()
    source = str(
        embedded[name].diffusion if name in embedded else find_model(Path(name), "diffusion", "model_index.json")
    )
    return _load(DiffusionFeaturePipeline, source, marker="model_index.json", revision=revision)


def load_discovery(name: str, level: int | None = None, revision: str | None = None) -> StructureDiscoveryModel:
    """Load a discovery network.

    Args:
        name: the name of an embedded model, a folder written by the discovery training, or a Hub id.
        level: which level of a nested network, 1 the coarsest; default: the finest.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ModelError: if there is no such model or level, or it is damaged.
        NetworkError: if the Hub cannot be reached.
    """
    embedded = embedded_models()
    source = embedded[name].discovery if name in embedded else find_model(Path(name)) if Path(name).is_dir() else name
    model = _load(StructureDiscoveryModel, str(source), marker="config.json", revision=revision).eval()
    levels = model.to(memory_format=torch.channels_last_3d).levels  # convolutions of few channels are faster so
    if level is None:
        return levels[-1]
    if not 1 <= level <= len(levels):
        raise ModelError(f"{name} has the levels {list(range(1, len(levels) + 1))}, not {level}.")
    return levels[level - 1]


def push(folder: str | Path, repo_id: str, **options) -> str:
    """Push a model folder to the Hub, after loading it once to check that it is complete.

    Args:
        folder: a trained discovery network, UNet or diffusion pipeline.
        options: of [`push_folder`].

    Returns:
        The address of the commit or pull request.

    Raises:
        ModelError: if the folder holds no complete model, or the id is invalid.
        NetworkError: if the Hub refuses or cannot be reached.
    """
    kind = folder_kind(folder)
    _load_once(folder, kind)
    return push_folder(folder, repo_id, **options)


def pull(
    repo_id: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Fetch a model repository, verify every file, load it once, and copy it to a folder if one is given.

    Args:
        repo_id: `user/name`.
        folder: where to copy it, in one step, so that there is always the old or the new model.
            Default: it stays in the Hub's cache.
        revision: branch, tag or commit.
        local_files_only: use the cache, not the network.
        overwrite: replace a model folder that exists.

    Returns:
        The folder, or the snapshot in the cache.

    Raises:
        OutputError: if the folder exists or cannot be written, or holds other files than those of a model.
        ModelError: if the repository, or a folder to be replaced, holds no model of this package.
        NetworkError: if it cannot be downloaded completely.
    """
    target = Path(folder) if folder is not None else None
    if target is not None:
        check_folder(target.parent)
        recover_folder(target.parent)
        _check_replaceable(target, overwrite)
    snapshot = fetch_snapshot(repo_id, revision=revision, local_files_only=local_files_only)
    _load_once(snapshot, folder_kind(snapshot))
    if target is None:
        return snapshot
    with replaced_folder(target.resolve()) as temporary:  # a link to a folder stays
        for path in snapshot.rglob("*"):  # other programs may have cached further files
            name = path.relative_to(snapshot)
            if path.is_file() and is_data_file(name.as_posix()):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary / name)
    return target


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Check that only files of a model are lost if a folder is replaced.

    Raises:
        OutputError: if it exists and `overwrite` is not set, is a file, or holds other files.
        ModelError: if it holds no model.
    """
    if os.path.lexists(target) and not target.is_dir():
        raise OutputError(f"{target}: is not a folder; choose another.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists already; --overwrite replaces it.")
    folder_kind(target)
    if (target / "checkpoints").exists():
        raise OutputError(f"{target}: holds the checkpoints of a training, which would be lost; choose another.")
    files = sorted(path.relative_to(target) for path in target.rglob("*") if not path.is_dir())
    if other := next((name for name in files if not is_data_file(name.as_posix())), None):
        raise OutputError(f"{target}: holds {other}, which is no file of a model and would be lost; choose another.")


def _load_once(folder: str | Path, kind: str) -> None:
    """Check that a model can be loaded."""
    _load(_MODEL_CLASSES[kind], str(folder), marker="model_index.json" if kind == "diffusion" else "config.json")


def _load(kind, source: str, marker: str, **options):
    check_source(kind.__name__, Path(source), source, marker, options.get("revision"))
    try:
        with _no_progress_bar():  # for two small files
            return kind.from_pretrained(source, **options)
    except (ModelError, NetworkError):
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise ModelError(f"{source}: cannot be loaded as {kind.__name__}: {first_line(error)}") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Turn diffusers' progress bars off within the context, and restore the setting after it."""
    enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            diffusers_logging.enable_progress_bar()
