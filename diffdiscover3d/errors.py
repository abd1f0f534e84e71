"""Exceptions raised by this package, each with the exit code of the command line."""

import sys


class DiffDiscoverError(Exception):
    """Base class of this package's errors. The message is one line with the problem, its location and a remedy."""

    exit_code = 1


class InputError(DiffDiscoverError, ValueError):
    """An input file or array cannot be used: missing, damaged, not a 3D volume or without contrast."""

    exit_code = 3


class OutputError(DiffDiscoverError, OSError):
    """An output cannot be written: it already exists, the folder is read-only or the disk is full."""

    exit_code = 4


class ModelError(DiffDiscoverError, ValueError):
    """A model, its weights, its configuration or a training checkpoint cannot be used."""

    exit_code = 5


class NetworkError(DiffDiscoverError, OSError):
    """The Hub could not be reached or answered with an error."""

    exit_code = 6


class MemoryLimitError(DiffDiscoverError, MemoryError):
    """The operation needs more memory than this machine has free."""

    exit_code = 7


class NothingToDivideError(DiffDiscoverError, ValueError):
    """No volume has inclusions that a training on assigned parts could divide into parts."""

    exit_code = 8


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none.

    >>> first_line(RuntimeError("out of memory\\nmore")), first_line(EOFError())
    ('out of memory', 'EOFError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def without_options(message: str) -> str:
    """A message without its last clause if that names an option, for commands that do not have it.

    >>> without_options("a.nii: contains 2 NaN voxels; use --nan-to-zero to set them to 0.")
    'a.nii: contains 2 NaN voxels'
    """
    problem, _, remedy = message.rpartition(";")
    return problem if problem and "--" in remedy else message


OUT_OF_MEMORY = "out of memory; resample the volume or use a larger machine."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error; on the CPU, torch raises a plain RuntimeError."""
    if isinstance(error, MemoryError | _torch_out_of_memory()):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def expected_errors() -> tuple[type[BaseException], ...]:
    """Error types that the command line reports in one line: package, value, file system and out-of-memory errors."""
    return (DiffDiscoverError, ValueError, OSError, MemoryError, _torch_out_of_memory())


def exit_code(error: BaseException) -> int:
    """The exit code of an error of one of the [`expected_errors`] types."""
    if isinstance(error, DiffDiscoverError):
        return error.exit_code
    if isinstance(error, MemoryError | _torch_out_of_memory()):
        return MemoryLimitError.exit_code
    return OutputError.exit_code if isinstance(error, OSError) else 2


def _torch_out_of_memory() -> type[BaseException]:
    """torch's out-of-memory error, or MemoryError if torch has not been imported."""
    return sys.modules["torch"].OutOfMemoryError if "torch" in sys.modules else MemoryError
