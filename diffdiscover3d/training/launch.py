"""How a training was launched: its processes, device and mixed precision."""

import os

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffdiscover3d.training.config import TrainingConfig
from diffdiscover3d.training.optimizers import check_8bit_adam
from diffdiscover3d.utils.processes import keep_process_group

_MARK = "made_by_diffdiscover3d"  # in accelerate's state, of which a process has one


def check_launcher() -> None:
    """Refuse launchers that shard the weights, before they do.

    Raises:
        ValueError: if the processes were started with FSDP, DeepSpeed, Megatron or a parallelism config.
    """
    sharding = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in sharding):
        raise ValueError(
            "the launcher must not shard the weights (FSDP, DeepSpeed, ...): checkpoints and averages are whole, "
            "and the networks fit on one GPU many times over; launch with --multi_gpu."
        )


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a config; it follows `accelerate launch` where that started the process.

    Trainings that follow each other in one process may differ in their precision. Where the caller's own code made an
    accelerator first, its precision holds.

    Raises:
        ValueError: if the launcher started several processes that do not work together, the tracker is not
            installed, fp16 is wanted on a CPU, or the caller's own accelerator has another precision.
    """
    state = AcceleratorState._shared_state
    wanted = None if config.mixed_precision == "auto" else config.mixed_precision
    kept = state.get("_mixed_precision")
    is_ours = kept is None or _MARK in state
    if is_ours and wanted not in (None, kept):
        AcceleratorState._reset_state()  # or accelerate keeps the precision of the first training
    try:
        accelerator = Accelerator(
            mixed_precision=wanted,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
            step_scheduler_with_optimizer=False,
        )
    except (ImportError, ValueError) as error:
        if not is_ours and wanted not in (None, kept):
            raise ValueError(
                f"`mixed_precision` is {wanted} and this process has an accelerator with {kept}; give {kept}, or train "
                "before it is made."
            ) from error
        raise ValueError(f"`report_to` is {config.report_to!r}, which cannot be used here: {error}") from error
    finally:
        if is_ours and "_mixed_precision" in state:  # accelerate sets it before it looks for trackers
            state[_MARK] = True
    if accelerator.num_processes > 1:
        keep_process_group()
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`mixed_precision` fp16 needs a GPU; on a CPU give --mixed-precision bf16 or no.")
    missing = sorted(set(config.trackers) - {"all"} - {str(getattr(t, "value", t)) for t in accelerator.log_with})
    if missing:
        raise ValueError(f"`report_to` is {config.report_to!r}: not installed here; pip install {' '.join(missing)}.")
    check_8bit_adam(config, accelerator.device)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        # otherwise each process would train its own model, all of them in the same folder
        raise ValueError(
            f"{started} processes were started but {accelerator.num_processes} work together; on a machine without "
            "GPUs set ACCELERATE_USE_CPU=true."
        )
    return accelerator
