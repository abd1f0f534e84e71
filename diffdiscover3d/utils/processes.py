"""Rank and number of the processes that a launcher started together."""

import contextlib
import functools
import logging
import os
import sys
from datetime import timedelta

_LEFT_BEHIND = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OTHER_LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of MPI, which accelerate also follows
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEPT: list = []


def is_launched() -> bool:
    """Whether all four variables are set that `accelerate launch` and torchrun set."""
    return all(os.environ.get(name) for name in _NAMES)


def local_rank() -> int:
    """The number of this process among those of one launch on this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK") or 0) if is_launched() else 0


def forget_other_launches() -> str | None:
    """Unset what an earlier launch or a batch system left behind, so that libraries do not wait for other processes.

    Returns:
        A line for the user, `None` if nothing was left behind.
    """
    left_over = [name for name in _LEFT_BEHIND if name in os.environ]
    if is_launched() or any(name in os.environ for name in _OTHER_LAUNCHERS) or not left_over:
        return None
    values = ", ".join(f"{name}={os.environ.pop(name)}" for name in left_over)
    return f"{values} without a launcher: this process works alone"


def keep_process_group() -> None:
    """Keep the process group in memory until this process ends, also when it has been destroyed.

    The last reference is often that of DistributedDataParallel. If it is dropped, gloo's destructor waits for its
    threads while it holds the interpreter's lock, for which a thread that frees the tensors of a collective waits.
    """
    import torch.distributed as dist  # slow, and not needed by a process that is alone

    if dist.is_available() and dist.is_initialized():
        _KEPT.append(dist.group.WORLD)


def exit_process(code: int) -> None:
    """End this process with an exit code: one that is alone as usual, one of a launch without finalization.

    Threads of PyTorch that outlive a training of several processes can deadlock while the interpreter is finalized
    (https://github.com/pytorch/pytorch/issues/190489), and the launcher then waits for ever. Call it last: trackers
    are finished, files closed and the process group destroyed.
    """
    if not is_launched():
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # a reader that has gone, or a stream that was closed
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def rank_and_world_size(timeout_seconds: float = 120) -> tuple[int, int]:
    """The rank of this process and the number of processes, once all of them have joined a process group.

    Environment variables alone prove nothing: batch systems and earlier launches leave `WORLD_SIZE` or `RANK` behind.
    Without all four variables that `accelerate launch` and torchrun set, the process is alone.

    Args:
        timeout_seconds: how long to wait for the other processes.

    Raises:
        ValueError: if the variables are not numbers, or the other processes do not join.
    """
    if not is_launched():
        return 0, 1
    values = [os.environ[name] for name in _NAMES]
    if not (values[0].isdigit() and values[1].isdigit() and int(values[0]) < int(values[1])):
        raise ValueError(
            f"`RANK` must be in 0..WORLD_SIZE-1, got RANK={values[0]} and WORLD_SIZE={values[1]}; unset both."
        )
    if int(values[1]) == 1:
        return 0, 1
    return _join(values[1], timeout_seconds)


@functools.cache
def _join(world_size: str, timeout_seconds: float) -> tuple[int, int]:
    """Form the process group once; it cannot be formed again when other processes have moved on."""
    import torch.distributed as dist  # slow, and not needed by a process that is alone

    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"`WORLD_SIZE` is {world_size}, but the other processes did not join within {timeout_seconds:g} s; start "
            f"all of them with accelerate launch or torchrun, or unset {', '.join(_NAMES)}."
        ) from error
    rank, world = dist.get_rank(), dist.get_world_size()
    keep_process_group()
    dist.destroy_process_group()
    return rank, world
