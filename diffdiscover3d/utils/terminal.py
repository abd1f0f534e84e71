"""Printing of text that may hold control characters, on any terminal or pipe."""

import contextlib
import logging
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


def say_lines(text: object) -> None:
    """Print a text of several lines, such as a table, line by line as [`say`]."""
    for line in str(text).split("\n"):
        say(line)


def prepare_streams() -> None:
    """Let standard output and error escape what their encoding lacks, and log warnings in escaped form.

    Called once, when a program starts.
    """
    for stream in (sys.stdout, sys.stderr):
        # replaced by an object without an encoding, or closed
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")
    handler = _QuietHandler()
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class PrintableFormatter(logging.Formatter):
    """Formatter of log messages as [`printable`] text; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _QuietHandler(logging.StreamHandler):
    """Handler on standard error that ignores a closed pipe, as [`say`] does."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            _silence(self.stream)
        else:
            super().handleError(record)


def _silence(stream) -> None:
    """Direct a stream to nowhere, so that the interpreter's flush at its end fails no more than later lines."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # no file behind it
        pass
    finally:
        os.close(nowhere)
