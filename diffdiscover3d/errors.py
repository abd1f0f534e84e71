"""The few exceptions users meet. Each carries the exit code the command line ends with."""

import sys


class DiffDiscoverError(Exception):
    """Base of all errors this package raises on purpose: one line with what, where and the remedy."""

    exit_code = 1


class InputError(DiffDiscoverError, ValueError):
    """An input file or array cannot be used: missing, damaged, not a 3D volume, without contrast."""

    exit_code = 3


class OutputError(DiffDiscoverError, OSError):
    """An output cannot be written: it exists already, the folder is read-only, the disk is full."""

    exit_code = 4


class ModelError(DiffDiscoverError, ValueError):
    """A model, its weights, its configuration or a training checkpoint cannot be used."""

    exit_code = 5


class NetworkError(DiffDiscoverError, OSError):
    """The Hub could not be reached or answered with an error."""

    exit_code = 6


class MemoryLimitError(DiffDiscoverError, MemoryError):
    """The work does not fit into this machine's memory."""

    exit_code = 7


OUT_OF_MEMORY = "out of memory; resample the volume or use a larger machine."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the CPU torch raises a bare RuntimeError then."""
    if isinstance(error, MemoryError | _torch_out_of_memory()):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def reportable_errors() -> tuple[type[BaseException], ...]:
    """What the command lines answer with one line: this package's errors, bad values, the disk and the memory."""
    return (DiffDiscoverError, ValueError, OSError, MemoryError, _torch_out_of_memory())


def exit_code(error: BaseException) -> int:
    """The exit code of any of [`reportable_errors`]."""
    if isinstance(error, DiffDiscoverError):
        return error.exit_code
    if isinstance(error, MemoryError | _torch_out_of_memory()):
        return MemoryLimitError.exit_code
    return OutputError.exit_code if isinstance(error, OSError) else 2


def _torch_out_of_memory() -> type[BaseException]:
    """torch's error for a full device, without importing torch where nothing else has."""
    return sys.modules["torch"].OutOfMemoryError if "torch" in sys.modules else MemoryError
