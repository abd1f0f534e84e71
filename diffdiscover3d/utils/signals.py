"""Handling of SIGINT, SIGTERM and SIGHUP: Ctrl-C, `kill`, a preempted job, a closed terminal."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence

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


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Run a command, without its standard output, and let it finish in its own way when this process is asked to stop.

    The command gets a session of its own, so that Ctrl-C in the terminal reaches this process alone. SIGINT, SIGTERM
    and SIGHUP are forwarded as SIGTERM, which, unlike SIGINT, ends an interpreter that is still starting silently.

    Returns:
        The exit code, negative if a signal ended the command, and whether a signal was forwarded.
    """
    process: subprocess.Popen | None = None
    asked = 0

    def forward(number, frame) -> None:
        nonlocal asked
        asked += 1
        if process is not None:
            process.terminate()

    before = {}
    # Python allows signal handlers only in the main thread; an ignored SIGHUP (`nohup`) stays ignored
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN or n == signal.SIGINT]
        before = {number: signal.signal(number, forward) for number in numbers}
    try:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        if asked:  # between the two lines before
            process.terminate()
        while True:  # a signal that arrives just before a wait without end would be handled after it
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1), asked > 0
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
