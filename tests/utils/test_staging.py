"""Several files are replaced as one, whatever happens between the renames."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils import staging as module
from diffdiscover3d.utils.staging import recover_folder, replaced_folder, staged_folder

NAMES = ("a.nii.gz", "b.tsv", "c.json", "deep/d.png")

KILLED = """
import os, signal, sys
from diffdiscover3d.utils import staging
target, calls = sys.argv[1], int(sys.argv[2])
replace = os.replace

def dying(source, place):
    global calls
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    calls -= 1
    replace(source, place)

os.replace = dying
with staging.staged_folder(target) as folder:
    (folder / "deep").mkdir()
    for name in {names!r}:
        (folder / name).write_text("new")
"""


def write(target, text: str, **options) -> None:
    with staged_folder(target, **options) as folder:
        (folder / "deep").mkdir()
        for name in NAMES:
            (folder / name).write_text(text)


def contents(target) -> dict[str, str]:
    return {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}


@pytest.mark.parametrize("calls", range(0, 10))
def test_a_kill_between_any_two_renames(tmp_path, calls):
    """One rename for the journal, then two for each of four files that are replaced."""
    target = tmp_path / "results"
    write(target, "old")
    command = [sys.executable, "-c", KILLED.replace("{names!r}", repr(NAMES)), str(target), str(calls)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == (-signal.SIGKILL if calls < 9 else 0)
    recover_folder(target)
    assert contents(target) == dict.fromkeys(NAMES, "old" if calls == 0 else "new")
    assert sorted(p.name for p in target.iterdir()) == ["a.nii.gz", "b.tsv", "c.json", "deep"]


@pytest.mark.parametrize("failing", range(1, 10))
def test_an_error_between_any_two_renames(tmp_path, monkeypatch, failing):
    target, replace, calls = tmp_path / "results", os.replace, []
    write(target, "old")

    def fail(source, place):
        calls.append(place)
        if len(calls) == failing:
            raise PermissionError(1, "Operation not permitted")
        replace(source, place)

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OutputError, match="not permitted"):
        write(target, "new")
    monkeypatch.undo()
    recover_folder(target)
    assert contents(target) == dict.fromkeys(NAMES, "old")


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "results"
    with (
        pytest.raises(OutputError, match=r"c\.json: was created by another program"),
        staged_folder(target, False) as f,
    ):
        (f / "a.nii.gz").write_text("new")
        (f / "c.json").write_text("new")
        (target / "c.json").write_text("theirs")
    assert contents(target) == {"c.json": "theirs"}


def test_the_staging_folder_of_a_running_process_is_left_alone(tmp_path):
    with staged_folder(tmp_path / "results") as folder:
        recover_folder(tmp_path / "results")
        (folder / "a").write_text("new")
    assert contents(tmp_path / "results") == {"a": "new"}


def test_a_journal_cannot_name_a_place_outside(tmp_path):
    target = tmp_path / "results"
    left = target / ".diffdiscover3d.left"
    (left / "new").mkdir(parents=True)
    (left / "owner").touch()
    (left / "new" / "x").write_text("new")
    (left / "journal.json").write_text('["../evil", "/tmp/evil", 3, "x"]')
    recover_folder(target)
    assert contents(target) == {"x": "new"} and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("state", ["deleted", "locked"])
def test_a_folder_taken_for_abandoned_before_it_is_locked(tmp_path, monkeypatch, state):
    """Another process finds the new folder between the creation and the lock of its owner file."""
    fcntl = pytest.importorskip("fcntl")
    real, held, found = fcntl.flock, [], []

    def flock(handle, operation):
        if not held:
            found.extend(tmp_path.glob(".diffdiscover3d.*"))
            held.append(os.open(found[0] / "owner", os.O_RDWR))
            if state == "deleted":
                recover_folder(tmp_path)
            else:
                real(held[0], operation)
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with staged_folder(tmp_path) as folder:
        for taken in tmp_path.glob(".diffdiscover3d.*"):  # the other process deletes what it has locked
            if taken != folder.parent:
                shutil.rmtree(taken)
        (folder / "a.txt").write_text("a")
    assert folder.parent != found[0]
    os.close(held[0])
    assert (tmp_path / "a.txt").read_text() == "a"
    recover_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# kills the process before its n-th change to the file system
KILLED_REPLACEMENT = """
import ctypes, os, signal, sys
from diffdiscover3d.utils import staging
target, left, exchange = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "exchange"

def dying(function):
    def call(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **named)
    return call

for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
staging._exchange = dying(staging._exchange) if exchange else lambda one, other: False
with staging.replaced_folder(target) as folder:
    for name in ("config.json", "weights"):
        (folder / name).write_text("new")
"""


def kill_replacement(target, step: int, how: str) -> bool:
    """Replace the folder and kill the process before its n-th change; whether it was killed."""
    command = [sys.executable, "-c", KILLED_REPLACEMENT, str(target), str(step), how]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def old_model(target) -> dict[str, str]:
    target.mkdir()
    for name in ("config.json", "weights"):
        (target / name).write_text("old")
    return contents(target)


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges folders by renameat2")
def test_a_kill_at_any_step_leaves_a_whole_folder(tmp_path):
    """Without any recovery: the exchange of two folders is one step."""
    seen = []
    for step in range(100):
        target = tmp_path / str(step) / "model"
        target.parent.mkdir()
        old = old_model(target)
        killed = kill_replacement(target, step, "exchange")
        seen.append(contents(target))
        assert seen[-1] in (old, dict.fromkeys(old, "new"))
        recover_folder(target.parent)
        assert contents(target) == seen[-1] and [p.name for p in target.parent.iterdir()] == ["model"]
        if not killed:
            break
    assert 8 < len(seen) < 100 and old in seen and seen[-2] == dict.fromkeys(old, "new")


@pytest.mark.slow
def test_a_kill_where_folders_cannot_be_exchanged(tmp_path):
    for step in range(100):
        target = tmp_path / str(step) / "model"
        target.parent.mkdir()
        old = old_model(target)
        killed = kill_replacement(target, step, "renames")
        recover_folder(target.parent)
        assert contents(target) in (old, dict.fromkeys(old, "new"))
        assert [p.name for p in target.parent.iterdir()] == ["model"]
        if not killed:
            break
    assert 8 < step < 100 and contents(target) == dict.fromkeys(old, "new")


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges folders by renameat2")
def test_there_is_always_a_folder(tmp_path):
    """Seen by another thread, which finds the file at every moment."""
    target = tmp_path / "model"
    old_model(target)
    found, over = [], threading.Event()

    def look():
        while not over.is_set():
            found.append((target / "config.json").exists())

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(50):
        with replaced_folder(target) as folder:
            (folder / "config.json").write_text(str(number))
    over.set()
    watcher.join()
    assert len(found) > 100 and all(found) and contents(target) == {"config.json": "49"}


def test_an_error_keeps_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "model"
    old = old_model(target)
    with pytest.raises(KeyError), replaced_folder(target) as folder:
        (folder / "config.json").write_text("new")
        raise KeyError
    assert contents(tmp_path) == {f"model/{name}": text for name, text in old.items()}
    rename = os.rename

    def failing(source, place):
        if place == target and "new" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, place)

    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(module.os, "rename", failing)
    with pytest.raises(OutputError, match="Input/output"), replaced_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert contents(tmp_path) == {f"model/{name}": text for name, text in old.items()}
