"""Printing of text that may hold control characters, on any terminal or pipe."""

import contextlib
import os
import sys
import unicodedata

_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format and surrogate characters; line and paragraph separators


def printable(text: object) -> str:
    r"""Text with control characters as escape sequences, so that a file name cannot steer the terminal.

    >>> printable("scan\x1b[2J\n.nii")
    'scan\\x1b[2J\\n.nii'
    """
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if unicodedata.category(c) in _ESCAPED else c
        for c in str(text)
    )


def say(text: object, error: bool = False) -> None:
    """Print one line on standard output, or standard error; once the reader has closed the pipe nothing is printed."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(printable(text), file=stream, flush=True)
    except BrokenPipeError:
        _silence(stream)


def prepare_streams() -> None:
    """Let standard output and error escape what their encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by an object without an encoding
            stream.reconfigure(errors="backslashreplace")


def _silence(stream) -> None:
    """Direct a stream to nowhere, so that the interpreter's flush at its end fails no more than later lines."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # no file behind it
        pass
    finally:
        os.close(nowhere)
