"""Training checkpoints without pickle: safetensors and JSON in a folder that appears whole or not at all."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffdiscover3d.errors import ModelError
from diffdiscover3d.utils.files import atomic_folder, sha256, write_json

STATE_FILE = "state.json"
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
        write_json(temporary / STATE_FILE, {"step": step, "files": hashes, **state})
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Read a checkpoint back: its tensors by file and its state.

    Raises:
        ModelError: if a file is missing, is damaged or is not the one that was written.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        _check_state(path, state)
        tensors = {}
        for name, expected in state["files"].items():
            if sha256(path / name) != expected:
                raise ModelError(f"{path / name}: damaged, its sha256 is not the one recorded.")
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a complete checkpoint ({type(error).__name__}: {error}).") from error
    return tensors, state


def _check_state(path: Path, state: dict) -> None:
    """Raise ValueError if it does not say what a checkpoint's state must, whatever else it says."""
    step, named = state["step"], _NAME.fullmatch(path.name)
    if type(step) is not int or step < 0 or (named and step != int(named.group(1))):
        raise ValueError(f"its state is of step {step!r}")
    missing = sorted({"model.safetensors", "optimizer.safetensors"} - state["files"].keys())
    if missing:
        raise ValueError(f"its state lists no {missing[0]}")
    for name in ("config", "identity"):
        if not isinstance(state.get(name, {}), dict):
            raise ValueError(f"its {name} is no mapping")


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


def later_checkpoints(folder: Path, step: int) -> tuple[list[Path], list[Path]]:
    """The checkpoints of later steps: those that are whole, and those that are damaged."""
    whole, damaged = [], []
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            try:
                load_checkpoint(path)
                whole.append(path)
            except ModelError:
                damaged.append(path)
    return whole, damaged


def remove_torn(folder: Path) -> None:
    """Delete what an interrupted write left behind."""
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
    """Put tensors packed by [`pack_optimizer`] back, in the memory layout of their parameters.

    A fused optimiser takes it for granted that a parameter and its moments lie alike.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
