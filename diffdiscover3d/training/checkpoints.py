"""Training checkpoints without pickle: safetensors and JSON in a folder that appears whole or not at all."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffdiscover3d.errors import ModelError
from diffdiscover3d.files import atomic_folder, sha256, write_json

_NAME = re.compile(r"checkpoint-(\d{8})")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> Path:
    """Write `checkpoint-<step>` under `folder`.

    Args:
        tensors: for each file (without its ending) a flat dict of tensors.
        state: JSON values; the step and each file's sha256 are added.

    Raises:
        OutputError: if it cannot be written; the checkpoints before are untouched.
    """
    target = folder / f"checkpoint-{step:08d}"
    if target.exists():
        return target
    with atomic_folder(target) as temporary:
        hashes = {}
        for name, group in tensors.items():
            file = temporary / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, file)
            hashes[file.name] = sha256(file)
        write_json(temporary / "state.json", {"step": step, "files": hashes, **state})
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Read a checkpoint back: its tensors by file and its state.

    Raises:
        ModelError: if a file is missing, is damaged or is not the one that was written.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {}
        for name, expected in state["files"].items():
            if sha256(path / name) != expected:
                raise ModelError(f"{path / name}: damaged, its sha256 is not the one recorded.")
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    except (OSError, KeyError, AttributeError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a complete checkpoint ({type(error).__name__}: {error}).") from error
    return tensors, state


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(folder: Path, resume: str, warn) -> tuple[dict, dict] | None:
    """The checkpoint to go on from: a folder, or with `latest` the newest under `folder` that is whole.

    Args:
        warn: called with a line for each damaged checkpoint that is passed over.

    Returns:
        Tensors and state, or `None` if `latest` finds no checkpoint at all.

    Raises:
        ModelError: if the folder named is no checkpoint, or all checkpoints under `folder` are damaged.
    """
    if resume != "latest":
        return load_checkpoint(Path(resume))
    candidates = list_checkpoints(folder)
    for path in reversed(candidates):
        try:
            return load_checkpoint(path)
        except ModelError as error:
            warn(f"skipping {path.name}: {error}")
    if candidates:
        raise ModelError(f"{folder}: every checkpoint is damaged; remove them to start anew.")
    return None


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, and what an interrupted write left behind."""
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors under flat names; hyper-parameters come from the config and are not stored."""
    return {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors packed by [`pack_optimizer`] back."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
