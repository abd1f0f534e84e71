"""The training loop of both phases: processes, steps, checkpoints, logs and pictures."""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from diffdiscover3d.errors import OutputError
from diffdiscover3d.reporting.plots import save_loss_curves
from diffdiscover3d.training.backward import make_pass
from diffdiscover3d.training.config import TrainingConfig, as_dict
from diffdiscover3d.training.data_order import StepBatches, TrainingVolumes, draw_generator
from diffdiscover3d.training.dropout import repeat_masks, sees_its_own_batch_only, set_slots, use_slot_dropout
from diffdiscover3d.training.optimizers import make_optimizer, skips_on_device
from diffdiscover3d.training.precision import FORMATS, measured_convolutions
from diffdiscover3d.training.resume import CONFIG_FILE, resume_training, save_training
from diffdiscover3d.training.schedules import learning_rate_at
from diffdiscover3d.training.step_metrics import StepMetrics
from diffdiscover3d.utils.files import output_errors, read_log, write_json, write_text
from diffdiscover3d.utils.progress import ProgressBar
from diffdiscover3d.utils.signals import StopRequest, TrainingInterrupted, ignore_signals
from diffdiscover3d.utils.staging import staged_folder

logger = logging.getLogger("diffdiscover3d")
HOST_SIDE = ("index", "flips", "noise_seed", "seed")  # entries of a batch that are only read on the host


class Task(Protocol):
    """The interface of a training to the loop, as of [`DiffusionTraining`] and [`DiscoveryTraining`]."""

    name: str
    model: torch.nn.Module
    volume_grid: tuple[int, int, int] | None  # volumes are resampled to it; None leaves them

    device: torch.device  # of the training
    suits_graphs: bool  # whether its steps are replayed as CUDA graphs by default
    has_one_shape: bool  # whether all batches have the same shapes

    def draw(self, volume: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """All random numbers for one volume, drawn on the CPU; a function of the generator alone."""

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict:
        """The input of `losses` for a batch: everything that reads values on the host or needs no gradient."""

    def losses(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Scalar losses of a prepared batch; the one called "loss" is minimised. Must not synchronise."""

    def compile(self) -> None:
        """Compile the networks with torch.compile, in place."""

    def has_metrics_after(self, step: int) -> bool:
        """Whether `after_step` returns metrics after this step; equal on all processes."""

    def after_step(self, step: int) -> dict[str, float]:
        """Called on every process after each step; returns further metrics to log, on the main process."""

    def preview(self, step: int, folder: Path) -> None:
        """Write preview images; called on the main process."""

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors to save in a checkpoint in addition to model and optimiser."""

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore the tensors returned by `state`."""

    def save(self, folder: Path, final: bool = True) -> None:
        """Write the model without changing the training; called on the main process, at the end or a checkpoint."""


def train(
    task: Task,
    config: TrainingConfig,
    volumes: Sequence,
    accelerator: Accelerator,
    identity: dict | None = None,
    on_checkpoint: Callable[[Task, Path, int], None] | None = None,
) -> Path:
    """Train `task.model` for `config.max_steps` steps and save it into `config.output_dir`.

    SIGINT and SIGTERM let the step be finished and saved.

    Args:
        identity: fingerprints of what the training is made of; a checkpoint with others is not resumed.
        on_checkpoint: called on the main process with task, output folder and step after each checkpoint but the last.

    Returns:
        The output folder: the model, `train_config.json`, `log.jsonl`, `checkpoints/` and `previews/`, and of a dataset
        that is split `split.json`.

    Raises:
        ModelError: if the loss stops being finite, or the checkpoint to resume from cannot be used.
        OutputError: if the output folder holds another model, or cannot be written.
        ValueError: if the batch cannot be shared by the processes.
        TrainingInterrupted: if it was asked to stop.
    """
    output = Path(config.output_dir)
    identity = identity or {}
    task.device = accelerator.device
    if config.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    trained = [p for p in task.model.parameters() if p.requires_grad]  # a parent is frozen
    optimizer = make_optimizer(config, trained, accelerator.device)
    task.model.to(memory_format=FORMATS[config.memory_format])
    dropouts = use_slot_dropout(task.model)
    if config.compile:
        task.compile()
    model, optimizer = accelerator.prepare(task.model, optimizer)
    start = resume_training(task, config, optimizer.optimizer, accelerator, output, identity)
    if accelerator.is_main_process:
        _begin_log(output, config, start)
        if getattr(volumes, "split_ids", None):
            write_json(output / "split.json", volumes.split_ids)
    if config.trackers:
        accelerator.init_trackers(f"diffdiscover3d-{task.name}", config=_tracker_config(config))
    if accelerator.num_processes > 1 and sees_its_own_batch_only(task.model):
        logger.info(
            "batch norm uses the volumes of each process separately: another number of processes gives other weights"
        )

    model.train()
    losses = functools.partial(task.losses, model)
    how = (task.suits_graphs, task.has_one_shape)
    begin = functools.partial(_begin_pass, optimizer, dropouts)
    backward = make_pass(losses, trained, begin, config, accelerator, *how)
    batches = _read_ahead(_make_loader(task, config, volumes, accelerator, start))
    metrics, clock, timed = StepMetrics(accelerator.device, output), time.perf_counter(), start
    alone = accelerator.num_processes == 1
    with (
        measured_convolutions(accelerator.device, task.has_one_shape),
        StopRequest(accelerator.num_processes) as stop,
        ProgressBar(config.max_steps, accelerator.is_main_process, start) as bar,
    ):
        bar.show(f"training, {task.name}")
        for step in range(start, config.max_steps):
            done = step + 1
            taken = _take_step(task, model, optimizer, backward, batches, config, accelerator, step, dropouts, stop)
            metrics.add(done, *taken)
            saving = done % config.checkpoint_every == 0 or done == config.max_steps
            logging_now = done % config.log_every == 0 or task.has_metrics_after(done) or done == config.max_steps
            # a single process stops at once; several stop at the same step, by the value that all of them have reduced
            metrics.catch_up(everything=saving or logging_now or (alone and stop.requested))
            stopping = stop.requested if alone else metrics.stop_requested
            if stopping:
                metrics.catch_up(everything=True)
            shown = metrics.latest | task.after_step(done)
            bar.done()
            bar.show(f"training, {task.name}", "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            if logging_now:
                if accelerator.is_main_process:
                    _log(output, done, config, shown, (time.perf_counter() - clock) / (done - timed))
                accelerator.log(shown, step=done)
                clock, timed = time.perf_counter(), done
            # a step that was not finite is no state to go on from
            if not metrics.bad_steps and (saving or stopping):
                save_training(task, config, optimizer.optimizer, accelerator, output, done, identity)
                if on_checkpoint and accelerator.is_main_process and not stopping and done < config.max_steps:
                    on_checkpoint(task, output, done)
            if stopping and done < config.max_steps:
                accelerator.wait_for_everyone()  # a launcher that sees one process end may kill the one that saves
                accelerator.end_training()
                saved = "its last good step" if metrics.bad_steps else "it"
                raise TrainingInterrupted(f"interrupted after step {done}; --resume latest goes on from {saved}.")
            wants_preview = config.preview_every and (done % config.preview_every == 0 or done == config.max_steps)
            if wants_preview and accelerator.is_main_process:
                task.preview(done, output / "previews")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with staged_folder(output) as folder:
            task.save(folder)
        save_loss_curves(output / "losses.png", output / "log.jsonl")
    accelerator.end_training()
    return output


def _take_step(
    task, model, optimizer, backward, batches, config, accelerator, step, dropouts, stop
) -> tuple[tuple[str, ...], torch.Tensor]:
    """One optimiser step over all micro-batches, without synchronising; returns its losses for [`StepMetrics`]."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step)
    # for code that uses the global generator: one seed per step and process makes a resumed step reproducible
    torch.manual_seed(draw_generator(config.seed, step, -1 - accelerator.process_index & 0xFFFF).initial_seed())
    sums: dict[str, torch.Tensor] = {}
    finite = torch.ones((), device=accelerator.device)
    skips = skips_on_device(optimizer)
    for _ in range(config.gradient_accumulation_steps):
        batch = next(batches)
        set_slots(dropouts, config.seed, step, batch.pop("slot").tolist())
        batch = {k: v if k in HOST_SIDE else v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
        batch = task.prepare(batch)
        with accelerator.accumulate(model):
            losses = backward(batch)
            if accelerator.sync_gradients:
                limit = config.max_grad_norm or float("inf")
                norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                if accelerator.scaler is None:  # a float16 scaler skips overflowing steps itself
                    finite = torch.isfinite(norm).float()
                    if skips:
                        optimizer.optimizer.found_inf = 1 - finite
            if skips or bool(finite):
                optimizer.step()
            if backward.resets_gradients:
                optimizer.zero_grad()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / config.gradient_accumulation_steps
    asked = torch.full((), float(stop.requested), device=accelerator.device)
    return tuple(sums), accelerator.reduce(torch.stack([*sums.values(), finite, asked]), reduction="mean")


def _begin_pass(optimizer: torch.optim.Optimizer, dropouts: list) -> None:
    """Undo what an earlier pass of the same step has left: its gradients and the numbers of its dropout masks."""
    optimizer.zero_grad()
    repeat_masks(dropouts)


def _read_ahead(batches: Iterable) -> Iterator:
    """The batches, each assembled in a thread while the step before it runs.

    A worker of the DataLoader would be a process: it would pickle the volumes or load them anew, and its start takes
    seconds. `num_workers` gives processes to those whose loading is the bottleneck.
    """
    iterator = iter(batches)
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, iterator, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, iterator, None)
            yield batch


def _make_loader(task, config, volumes, accelerator, start) -> DataLoader:
    batches = StepBatches(
        len(volumes),
        config.batch_size,
        config.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        config.seed,
        start,
        config.max_steps,
    )
    data = TrainingVolumes(volumes, task.draw, config.seed, config.flips, task.volume_grid)
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        persistent_workers=config.num_workers > 0,
        # a fork server, the default since Python 3.14, would be sent every tensor of the task as an open file
        multiprocessing_context="fork" if config.num_workers and sys.platform == "linux" else None,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the global one, in the middle of a step
    )


def _begin_log(output: Path, config: TrainingConfig, start: int) -> None:
    """Write the options down, and drop log lines of steps that a resumed training takes again."""
    write_json(output / CONFIG_FILE, _public_config(config))
    log = output / "log.jsonl"
    if log.exists():
        with output_errors(log):
            rows = [row for row in read_log(log) if row["step"] <= start]
        write_text(log, "".join(json.dumps(row) + "\n" for row in rows))


def _public_config(config: TrainingConfig) -> dict:
    """The options without the output folder, what was resumed and where the model is pushed."""
    local = ("output_dir", "resume", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy")
    return {k: v for k, v in as_dict(config).items() if k not in local}


def _log(output: Path, step: int, config: TrainingConfig, metrics: dict[str, float], seconds: float) -> None:
    row = {"step": step, "lr": learning_rate_at(config, step - 1), **metrics}
    log = output / "log.jsonl"
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OutputError(
            f"{log}: cannot be written ({error.strerror}); free some space, then --resume latest."
        ) from error
    shown = " ".join(f"{k}={v:.4f}" for k, v in metrics.items())
    logger.info("step %d/%d %s (%.2f s a step)", step, config.max_steps, shown, seconds)


def _tracker_config(config: TrainingConfig) -> dict:
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in as_dict(config).items()}
