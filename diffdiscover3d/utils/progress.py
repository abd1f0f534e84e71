"""One progress bar for long work: what is being done, how far it is, how long it will take."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """A bar on stderr that names the stage of the work; nothing is drawn where it is no terminal.

    Args:
        total: steps of the whole work.
        enabled: draw it at all.
        start: steps that were done before.
        force: draw as on a terminal (for tests); default: look.

    Example:
        >>> with Stages(total=2, enabled=False) as stages:
        ...     stages.show("reading the scan")
        ...     stages.done()
    """

    def __init__(self, total: int, enabled: bool = True, start: int = 0, force: bool | None = None):
        console = Console(stderr=True, force_terminal=force)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total, completed=start, figures="")
        self._case, self._left, self._total, self._finished = "", 0, total, start

    def __enter__(self) -> "Stages":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin_case(self, case: str, steps: int) -> None:
        """Name the scan that is worked on, in front of every stage.

        Args:
            steps: how many it has; those that the case before did not need are taken off the total, so that
                a skipped one does not make the rest look fast.
        """
        self._total -= self._left
        self._bar.update(self._task, total=self._total)
        self._case, self._left = f"{case}: ", steps

    def show(self, stage: str, figures: str = "") -> None:
        """Name the stage that begins, with figures in small print behind the bar."""
        self._bar.update(self._task, description=self._case + stage, figures=figures)

    def within(self, done: int, total: int, unit: str) -> None:
        """Say how far a long step is, of which the bar then shows that share.

        Example:
            >>> stages.within(3, 12, "window")  # doctest: +SKIP
        """
        self._bar.update(self._task, completed=self._finished + done / total, figures=f"{unit} {done} of {total}")

    def done(self, steps: int = 1) -> None:
        """Count finished steps."""
        self._left = max(0, self._left - steps)
        self._finished += steps
        self._bar.update(self._task, completed=self._finished)
