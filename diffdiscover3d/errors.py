"""The few exceptions users meet. Each carries the exit code the command line ends with."""


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
