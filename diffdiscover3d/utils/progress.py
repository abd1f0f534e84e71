"""Progress bar with the current operation, elapsed time and remaining time."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

_WIDE = 110  # columns of a terminal on which everything is shown


class ProgressBar:
    """A progress bar on stderr that is shown only on terminals.

    Args:
        total: total number of steps.
        enabled: show the bar.
        start: number of steps completed before.
        force: treat stderr as a terminal (for tests); default: detect.
        callback: called at every change, also where no bar is shown, with the completed share in [0, 1] and the current
            operation. An exception that it raises ends the work.

    Example:
        >>> with ProgressBar(total=2, enabled=False) as bar:
        ...     bar.show("reading the scan")
        ...     bar.done()
    """

    def __init__(
        self,
        total: int,
        enabled: bool = True,
        start: int = 0,
        force: bool | None = None,
        callback: Callable[[float, str], None] | None = None,
    ):
        console = Console(stderr=True, force_terminal=force)
        wide = console.width >= _WIDE
        self._bar = Progress(
            # on a narrow terminal the description gives way, and details are left out: numbers stay readable
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            BarColumn(bar_width=40 if wide else 12),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=5)),
            *((TimeElapsedColumn(),) if wide else ()),
            TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            *((TextColumn("{task.fields[details]}", style="dim"),) if wide else ()),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
            expand=not wide,
        )
        self._task = self._bar.add_task("starting", total=total, completed=start, details="")
        self._case, self._left, self._total, self._finished = "", 0, total, start
        self._callback, self._operation = callback, "starting"

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin_case(self, case: str, steps: int) -> None:
        """Set the name of the current scan, shown before each operation.

        Args:
            case: name of the scan.
            steps: number of steps of the scan. Unused steps of the previous scan are subtracted from the total, so that
                skipped scans do not distort the remaining time.
        """
        self._total -= self._left
        self._bar.update(self._task, total=self._total)
        self._case, self._left = f"{case}: ", steps

    def show(self, operation: str, details: str = "") -> None:
        """Set the name of the current operation and the details shown after the bar."""
        self._operation = operation
        self._bar.update(self._task, description=self._case + operation, details=details)
        self._notify(self._finished)

    def within(self, done: int, total: int, unit: str) -> None:
        """Show the progress within the current step.

        Example:
            >>> bar.within(3, 12, "window")  # doctest: +SKIP
        """
        self._bar.update(self._task, completed=self._finished + done / total, details=f"{unit} {done} of {total}")
        self._notify(self._finished + done / total)

    def done(self, steps: int = 1) -> None:
        """Advance the bar by completed steps."""
        self._left = max(0, self._left - steps)
        self._finished += steps
        self._bar.update(self._task, completed=self._finished)
        self._notify(self._finished)

    def _notify(self, finished: float) -> None:
        if self._callback is not None:
            self._callback(min(1.0, finished / self._total) if self._total else 1.0, self._operation)
