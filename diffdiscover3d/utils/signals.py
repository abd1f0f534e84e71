"""Being asked to stop: by Ctrl-C, by `kill`, by a cluster that wants its machine back."""

import multiprocessing
import os
import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was asked to stop and has saved what it had; its text says where it goes on from."""


class StopRequest:
    """Within the context SIGINT and SIGTERM are noted instead of ending the process, so that a step can be finished.

    A second signal to a training of one process ends it at once: for those who cannot wait for the step. With several
    processes it is ignored, because their launcher passes on the very signal that all of them got already.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self, num_processes: int = 1):
        self.requested = False
        self._alone = num_processes == 1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # elsewhere than in the main thread Python allows no handlers: whoever runs the thread decides
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
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
    """For processes that load volumes: a signal to the whole group is the training's to answer.

    They end when the training closes its loader, or is gone.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: temporary files are removed, the exit code is 130."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def end_children() -> None:
    """Kill the processes this one has started; for an exit that must not wait for those that ignore signals."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
