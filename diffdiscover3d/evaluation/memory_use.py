"""Peak memory of a piece of work, for the tables."""

import threading
from types import TracebackType

_INTERVAL = 0.1  # seconds between two looks


class PeakMemory:
    """Within the context, watch the resident memory of this process and of those it starts.

    Attributes:
        peak_mib: the largest sum seen, in MiB.
    """

    def __init__(self):
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        import psutil

        own, total = psutil.Process(), 0
        for process in (own, *own.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # ended meanwhile
                continue
        self.peak_mib = max(self.peak_mib, round(total / 2**20, 1))
