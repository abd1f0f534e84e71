"""Files of the app's visitors: all in one temporary folder, and removed with the session that they belong to."""

import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdiscover3d.errors import InputError


class JobStoppedError(Exception):
    """Raised by the progress callback of a job whose visitor has stopped it or closed the page."""


class Sessions:
    """The uploads and results of every session of the app.

    A session is identified by the string that Gradio gives to an open page. It has its current uploads and the results
    of its last job. Equal uploads of two sessions are one file, which is kept until neither uses it.

    Args:
        root: existing folder for all files; nothing outside it is read or removed.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).resolve()
        self._lock = threading.Lock()
        self._uploads: dict[str, set[Path]] = {}
        self._jobs: dict[str, Path] = {}
        self._stopped: set[str] = set()
        self._results = self.root / "results"
        self.demos = self.root / "demos"
        for folder in (self._results, self.demos):
            folder.mkdir()

    def hold(self, session: str, paths: Iterable[str | Path]) -> list[Path]:
        """Record the current uploads of a session; those it used before are removed.

        Args:
            session: of the page.
            paths: files in the app's folder.

        Returns:
            The resolved paths.

        Raises:
            InputError: if a path is outside the app's folder, or the file has been removed.
        """
        held = [self._check(Path(path)) for path in paths]
        with self._lock:
            dropped = self._uploads.get(session, set()) - set(held)
            self._uploads[session] = {path for path in held if not path.is_relative_to(self.demos)}
            self._remove_unused(dropped)
        return held

    def start(self, session: str) -> None:
        """Allow the next job of a session after an earlier one was stopped."""
        with self._lock:
            self._stopped.discard(session)

    def stop(self, session: str) -> None:
        """Stop the job of a session at its next step, or before it begins."""
        with self._lock:
            self._stopped.add(session)

    @contextmanager
    def job(self, session: str) -> Iterator[Path]:
        """Yield the folder of a new job. The results of the session's job before are removed.

        If the job fails or the session ends meanwhile, the folder is removed.
        """
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self._results))
        with self._lock:
            previous = self._jobs.get(session)
            self._jobs[session] = folder
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)
        finished = False
        try:
            self.check_wanted(session, folder)
            yield folder
            finished = True
        finally:
            with self._lock:
                current = self._jobs.get(session) == folder
                if current and not finished:
                    del self._jobs[session]
            if not (current and finished):
                shutil.rmtree(folder, ignore_errors=True)

    def check_wanted(self, session: str, folder: Path) -> None:
        """Raise a JobStoppedError if the job of this folder was stopped or its session has ended."""
        with self._lock:
            if session in self._stopped or self._jobs.get(session) != folder:
                raise JobStoppedError

    def end(self, session: str) -> None:
        """Remove the uploads and results of a session; a running job stops at its next step."""
        with self._lock:
            self._remove_unused(self._uploads.pop(session, set()))
            folder = self._jobs.pop(session, None)
            self._stopped.discard(session)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End all sessions."""
        for session in {*self._uploads, *self._jobs}:
            self.end(session)

    def _check(self, path: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(self.root) or resolved.is_relative_to(self._results):
            raise InputError(f"{path.name}: was not uploaded to this app; upload it.")
        if not resolved.is_file():
            raise InputError(f"{path.name}: the upload is no longer there; upload it again.")
        return resolved

    def _remove_unused(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if not any(path in held for held in self._uploads.values()):
                path.unlink(missing_ok=True)
                if path.parent != self.root and not any(path.parent.iterdir()):
                    path.parent.rmdir()
