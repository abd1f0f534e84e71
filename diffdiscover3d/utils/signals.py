"""Handling of SIGINT, SIGTERM and SIGHUP: Ctrl-C, `kill`, a preempted job, a closed terminal."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

_TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_SIGNALS = (signal.SIGINT, *_TERMINATIONS)


class TrainingInterrupted(KeyboardInterrupt):
    """Raised when a training has stopped on request after saving a checkpoint; the message gives the step."""


class StopRequest:
    """Context that records SIGINT, SIGTERM and SIGHUP instead of ending the process, so that a step can finish.

    In a single-process training, a second signal ends the process immediately. With several processes it is ignored,
    because the launcher forwards the same signal to all of them.

    Attributes:
        requested: whether a signal has been received.
    """

    def __init__(self, num_processes: int = 1):
        self.requested = False
        self._alone = num_processes == 1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows signal handlers only in the main thread
        if threading.current_thread() is threading.main_thread():
            numbers = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN or n == signal.SIGINT]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number, frame) -> None:
        if self.requested and self._alone:
            raise KeyboardInterrupt
        self.requested = True


def ignore_signals(_worker: int = 0) -> None:
    """Ignore termination signals in a data-loading worker, so that only the training handles a signal to the group.

    Workers exit when the training closes the loader or ends.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Within the context SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    Temporary files are then removed and the exit code is 130. A SIGHUP that is ignored (`nohup`) stays ignored. Forked
    children keep the default action: a pool that terminates its workers relies on it.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    numbers = [n for n in _TERMINATIONS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _restore_default_actions() -> None:
    for number in _TERMINATIONS:
        if signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_default_actions)


def end_children() -> None:
    """Kill the child processes of this process, including workers that ignore signals."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
