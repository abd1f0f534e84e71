"""Training checkpoints as atomically written folders of safetensors and JSON, without pickle."""

import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffdiscover3d.errors import ModelError
from diffdiscover3d.utils.files import TEMPORARY_PREFIX, atomic_folder, read_json, sha256, write_json

STATE_FILE = "state.json"
_NAME = re.compile(r"checkpoint-(\d{8})")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> Path:
    """Write `checkpoint-<step>` under `folder`.

    Args:
        step: training step, part of the folder name.
        tensors: flat dicts of tensors, one for each file, by file name without suffix.
        state: JSON values. The step and the sha256 of each file are added.

    Returns:
        The checkpoint folder. An existing checkpoint of this step is left unchanged.

    Raises:
        OutputError: if the checkpoint cannot be written. Earlier checkpoints are unaffected.
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
    """Load a checkpoint.

    Returns:
        The tensors by file name, and the state.

    Raises:
        ModelError: if a file is missing or damaged, or its sha256 does not match.
    """
    try:
        state = read_json(path / STATE_FILE)
        _check_state(path, state)
        tensors = {}
        for name, expected in state["files"].items():
            if sha256(path / name) != expected:
                raise ModelError(f"{path / name}: damaged: its sha256 differs from the recorded one.")
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a complete checkpoint ({type(error).__name__}: {error}).") from error
    return tensors, state


def _check_state(path: Path, state: dict) -> None:
    """Raise ValueError if the state of a checkpoint lacks a required entry or an entry is invalid."""
    step, named = state["step"], _NAME.fullmatch(path.name)
    if type(step) is not int or step < 0 or (named and step != int(named.group(1))):
        raise ValueError(f"its state has the step {step!r}")
    missing = sorted({"model.safetensors", "optimizer.safetensors"} - state["files"].keys())
    if missing:
        raise ValueError(f"its state lists no {missing[0]}")
    for name in ("config", "identity"):
        if not isinstance(state.get(name, {}), dict):
            raise ValueError(f"its {name} is not a mapping")


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
    """Load the checkpoint to resume from.

    Args:
        folder: folder of the checkpoints.
        resume: a checkpoint folder, or `latest` for the newest intact checkpoint under `folder`.
        warn: called with a message for each damaged checkpoint that is skipped.

    Returns:
        Tensors and state, or `None` if `resume` is `latest` and there are no checkpoints.

    Raises:
        ModelError: if `resume` is not a valid checkpoint, or all checkpoints under `folder` are damaged.
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
        raise ModelError(f"{folder}: every checkpoint is damaged; remove them to restart the training.")
    return None


def later_checkpoints(folder: Path, step: int) -> tuple[list[Path], list[Path]]:
    """The intact and the damaged checkpoints of later steps."""
    intact, damaged = [], []
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            try:
                load_checkpoint(path)
                intact.append(path)
            except ModelError:
                damaged.append(path)
    return intact, damaged


def remove_partial(folder: Path) -> None:
    """Delete half-written checkpoints, also where folders cannot be locked; no other process writes any."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flatten the state of an optimiser: its tensors, and integers as int64 tensors.

    Hyper-parameters are part of the config and are not included. bitsandbytes keeps the number of steps as an integer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{index}.{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor | int)
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors packed by [`pack_optimizer`], in the memory layout of their parameters.

    Fused optimisers require a parameter and its moments to have the same memory layout.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        is_count = value.dtype == torch.int64 and value.ndim == 0
        state.setdefault(int(index), {})[name] = int(value) if is_count else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
