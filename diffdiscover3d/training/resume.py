"""Saving and resuming the complete state of a training, with checks that the continuation is the same training."""

import dataclasses
import logging
import shutil
from pathlib import Path

import torch

from diffdiscover3d.errors import ModelError, OutputError
from diffdiscover3d.training import checkpoints
from diffdiscover3d.training.config import TrainingConfig, as_dict
from diffdiscover3d.training.dropout import sees_its_own_batch_only
from diffdiscover3d.training.schedules import EXTENDABLE_SCHEDULES
from diffdiscover3d.utils.files import read_json

logger = logging.getLogger("diffdiscover3d")
CONFIG_FILE = "train_config.json"

# options that may change on resume; data and models are compared by content, not by path
_FREE_OPTIONS = {
    "output_dir", "resume", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints", "preview_every",
    "report_to", "save_dtype", "init_from", "gradient_accumulation_steps", "dataset", "teacher",
    "parent", "children", "cuda_graphs", "num_train_epochs",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy",
}  # fmt: skip


def save_training(task, config, optimizer, accelerator, output: Path, step: int, identity: dict) -> None:
    """Write the checkpoint of a step and delete the oldest checkpoints; called on all processes.

    Raises:
        ModelError: if a weight is not finite; no checkpoint is written then.
        OutputError: if the checkpoint cannot be written.
    """
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    tensors = {
        "model": task.model.state_dict(),
        "optimizer": checkpoints.pack_optimizer(optimizer),
        **task.state(),
    }
    non_finite = [k for k, v in tensors["model"].items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if non_finite:
        raise ModelError(
            f"weights of step {step} are not finite ({non_finite[0]}); checkpoints in {output} are of earlier steps. "
            "Lower --learning-rate, or use --mixed-precision no."
        )
    state = {"config": as_dict(config), "identity": identity, "micro_batch": _micro_batch(config, accelerator)}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    checkpoints.save_checkpoint(output / "checkpoints", step, tensors, state)
    checkpoints.prune_checkpoints(output / "checkpoints", config.keep_checkpoints)


def check_output(config: TrainingConfig) -> None:
    """Check the output folder before any data are read.

    Raises:
        ModelError: if it contains a training and `resume` is not set, or the options differ; more steps are accepted if
            they leave the steps already taken unchanged.
        OutputError: if it contains a model but no checkpoint to resume from.
    """
    output = Path(config.output_dir)
    if config.resume is not None:
        _check_options(config, _written_options(output / CONFIG_FILE), output / CONFIG_FILE)
    if config.resume is None or not _in_folder(config.resume, output / "checkpoints"):
        _refuse_to_overwrite(output)


def _in_folder(resume: str, folder: Path) -> bool:
    """Whether a folder contains the checkpoint to resume from or, for `latest`, any checkpoint."""
    if resume == "latest":
        return bool(checkpoints.list_checkpoints(folder))
    return Path(resume).resolve().parent == folder.resolve()


def resume_training(task, config, optimizer, accelerator, output: Path, identity: dict) -> int:
    """Load the checkpoint to resume from into task, optimiser and gradient scaler.

    Returns:
        The step to start from; 0 without a checkpoint.

    Raises:
        ModelError: if the checkpoint is damaged or belongs to a different training, if there are later checkpoints, or
            if the output folder contains a training and `resume` is not set.
        OutputError: if the output folder contains a model but no checkpoint to resume from.
    """
    check_output(config)
    if config.resume is None:
        return 0
    found = checkpoints.find_checkpoint(output / "checkpoints", config.resume, logger.warning)
    intact, damaged = checkpoints.later_checkpoints(output / "checkpoints", found[1]["step"]) if found else ([], [])
    steps = accelerator.gather(torch.tensor([found[1]["step"] if found else 0], device=accelerator.device))
    if steps.unique().numel() > 1:
        raise ModelError(f"the processes found checkpoints of different steps {steps.tolist()}; share --output-dir.")
    if found is None:
        if accelerator.is_main_process:
            checkpoints.remove_partial(output / "checkpoints")
        return 0
    if intact:
        raise ModelError(
            f"{output} contains later checkpoints, up to {intact[-1].name}, that a resume from step {found[1]['step']} "
            "would replace; choose another --output-dir, or remove them."
        )
    tensors, state = found
    _check_options(config, state.get("config", {}), "the checkpoint")
    _check_identity(config, identity, state)
    before, now = state.get("micro_batch"), _micro_batch(config, accelerator)
    if before not in (None, now) and sees_its_own_batch_only(task.model):
        raise ModelError(
            f"batch norm statistics were computed over {before} volumes and would now be over {now}, which changes the "
            "training; use the same number of processes and accumulation steps as before."
        )
    try:
        task.model.load_state_dict(tensors["model"])
        checkpoints.unpack_optimizer(optimizer, tensors["optimizer"])
        task.load_state(tensors)
        if accelerator.scaler is not None and "scaler" in state:
            accelerator.scaler.load_state_dict(state["scaler"])
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"the checkpoint does not match this model ({str(error)[:200]}).") from error
    if accelerator.is_main_process:
        checkpoints.remove_partial(output / "checkpoints")
        for path in damaged:  # otherwise no checkpoint could be written at its step
            logger.warning("removing the damaged checkpoint %s", path)
            shutil.rmtree(path, ignore_errors=True)
    logger.info("resumed after step %d", state["step"])
    return state["step"]


def _micro_batch(config: TrainingConfig, accelerator) -> int:
    """The number of volumes per process and micro-batch."""
    return config.batch_size // (config.gradient_accumulation_steps * accelerator.num_processes)


def _refuse_to_overwrite(output: Path) -> None:
    existing = checkpoints.list_checkpoints(output / "checkpoints")
    if existing:
        raise ModelError(
            f"{output} already contains a training up to {existing[-1].name}; continue with --resume latest, "
            "or choose another --output-dir."
        )
    for marker in ("model_index.json", "config.json"):
        if (output / marker).exists():
            raise OutputError(f"{output} already contains a model ({marker}); choose another --output-dir.")


def _written_options(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        options = read_json(path)
        if not isinstance(options, dict):
            raise ValueError("not a mapping of options")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); remove it to resume without it.") from error
    return options


def _check_options(config: TrainingConfig, saved: dict, source) -> None:
    now, changed = as_dict(config), {}
    for f in dataclasses.fields(config):
        if f.name in _FREE_OPTIONS or not saved or (f.name not in saved and f.metadata.get("record_default", True)):
            continue
        old, new = saved.get(f.name, f.default), now.get(f.name, f.default)
        if old != new:
            changed[f.name] = (old, new)
    if config.num_train_epochs is not None:  # the number of steps is known when the volumes are
        changed.pop("max_steps", None)
    before = changed.get("max_steps", (None,))[0]
    if changed.keys() == {"max_steps"} and isinstance(before, int) and config.max_steps > before:
        reason = _why_not_extended(config)
        if reason is None:
            return
        raise ModelError(
            f"{source} is of a training of {before} steps, which cannot be extended to {config.max_steps}: {reason}; "
            f"use --max-steps {before} to resume it, or start one of {config.max_steps} steps in another --output-dir."
        )
    if changed:
        listed = ", ".join(f"{k} was {old!r} and is {new!r}" for k, (old, new) in sorted(changed.items()))
        raise ModelError(f"{source} belongs to a different training ({listed}); use the same options to resume it.")


def _why_not_extended(config: TrainingConfig) -> str | None:
    """The reason why more steps would change the steps already taken; `None` if they do not."""
    if config.lr_schedule not in EXTENDABLE_SCHEDULES:
        return f"the learning rates of the schedule {config.lr_schedule} depend on the number of steps"
    if not config.extendable:
        return "its last step differs from the steps before"
    return None


def _check_identity(config: TrainingConfig, now: dict, state: dict) -> None:
    """Compare the fingerprints of data and models with those in the checkpoint; without fingerprints, compare names."""
    saved, written, options = state.get("identity", {}), state.get("config", {}), as_dict(config)
    for name in sorted({"dataset", *now, *saved}):
        old, new = saved.get(name), now.get(name)
        if old is None and new is None:
            old, new = written.get(name), options.get(name)
        if old and old != new and name == "children":
            raise ModelError(
                f"the network of the checkpoint divides the parts of its parent into {old}, this one into {new}; "
                f"give --children {' '.join(map(str, old))} and the same --parent."
            )
        if old != new:
            raise ModelError(
                f"the checkpoint was trained with a different {name}; give a --{name.replace('_', '-')} with the same "
                "contents (the path may differ)."
            )
