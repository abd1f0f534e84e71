"""Temporary files of killed writers are deleted by the next writer, those of running ones are not."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffdiscover3d.utils import files, handles
from diffdiscover3d.utils import temporary_folders as module
from diffdiscover3d.utils.files import atomic_file, atomic_folder, clear_temporary_files
from diffdiscover3d.utils.staging import recover_folder
from diffdiscover3d.utils.temporary_folders import clear_abandoned

fcntl = pytest.importorskip("fcntl")

# writes each file or folder that a line names, and holds it open until another line arrives
WRITER = """
import sys
from pathlib import Path
from diffdiscover3d.utils.files import atomic_file, atomic_folder
for line in sys.stdin:
    is_folder = line.strip().endswith("/")
    with (atomic_folder if is_folder else atomic_file)(line.strip()) as temporary:
        if is_folder:
            temporary /= "weights"
        else:
            temporary.unlink()  # safetensors replaces the file, so that a lock on it would be lost
        temporary.write_text("half")
        print(temporary, flush=True)
        sys.stdin.readline()
        temporary.write_text(f"whole of {sys.argv[1]}")
    print("done", flush=True)
"""


@pytest.fixture
def start():
    started = []

    def start(name: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", WRITER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True, bufsize=1, env=environment)  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def say(process, line) -> str:
    """Send a line, and wait for the answer."""
    process.stdin.write(f"{line}\n")
    return process.stdout.readline().strip()


def test_a_killed_writer_leaves_nothing_for_long(tmp_path, start):
    """While another process writes to the same file."""
    target = tmp_path / "parts.tsv"
    target.write_text("old")
    dead, alive = start("dead"), start("alive")
    half, other = say(dead, target), say(alive, target)
    assert os.path.dirname(half) != os.path.dirname(other)
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    assert os.path.exists(half) and target.read_text() == "old"
    with atomic_file(target) as temporary:
        assert not os.path.exists(os.path.dirname(half)) and os.path.exists(other)
        temporary.write_text("mine")
    assert target.read_text() == "mine"
    assert say(alive, "") == "done" and target.read_text() == "whole of alive"
    assert os.listdir(tmp_path) == ["parts.tsv"]


def test_a_killed_writer_of_a_folder_leaves_nothing_for_long(tmp_path, start):
    dead, alive = start("dead"), start("alive")
    half, other = say(dead, f"{tmp_path / 'one'}/"), say(alive, f"{tmp_path / 'two'}/")
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    assert os.path.exists(half) and not (tmp_path / "one").exists()
    with atomic_folder(tmp_path / "one") as temporary:
        assert not os.path.exists(half) and os.path.exists(other)
        (temporary / "weights").write_text("mine")
    assert say(alive, "") == "done"
    assert {p.parent.name: p.read_text() for p in tmp_path.rglob("weights")} == {"one": "mine", "two": "whole of alive"}
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_results_in_the_folder_clear_them_too(tmp_path, start):
    dead = start("dead")
    half = say(dead, tmp_path / "manifest.tsv")
    recover_folder(tmp_path)
    assert os.path.exists(half)
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    recover_folder(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("system", ["no locks", "Windows"])
def test_without_locks_nothing_is_deleted(tmp_path, monkeypatch, system):
    """Whether its process is running cannot be found out."""

    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    left = tmp_path / ".diffdiscover3d-file.left"
    left.mkdir()
    for name in ("owner", "new.tmp"):
        (left / name).touch()
    if system == "Windows":
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_file(tmp_path / "a") as one, atomic_file(tmp_path / "b") as other:
        one.write_text("a")
        other.write_text("b")
    assert sorted(os.listdir(tmp_path)) == [left.name, "a", "b"] and len(list(left.iterdir())) == 2
    monkeypatch.undo()
    clear_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_is_looked_through_once_a_minute(tmp_path, monkeypatch):
    looked, now = [], [1000.0]
    monkeypatch.setattr(files, "clear_abandoned", lambda folder, _: looked.append(folder))
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    for _ in range(3):
        with atomic_file(tmp_path / "a") as one:
            one.write_text("a")
    assert looked == [tmp_path]
    now[0] += 61
    with atomic_file(tmp_path / "a") as one:
        one.write_text("a")
    assert looked == [tmp_path] * 2


def test_what_cannot_be_deleted_neither_fails_nor_stays_locked(tmp_path, monkeypatch):
    def iterdir(_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", iterdir)
        with atomic_file(tmp_path / "a") as one:
            one.write_text("a")
    assert (tmp_path / "a").read_text() == "a" and not handles._HELD
    clear_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_is_deleted_while_it_is_claimed(tmp_path, monkeypatch):
    """Its process deletes it between the opening of the owner file and the lock."""
    finished, real = [], fcntl.flock
    folder = tmp_path / ".x.1"
    folder.mkdir()
    (folder / "owner").touch()

    def flock(handle, operation):
        shutil.rmtree(folder)
        return real(handle, operation)  # succeeds, on a file that is gone

    monkeypatch.setattr(fcntl, "flock", flock)
    clear_abandoned(tmp_path, ".x.", finished.append)
    assert finished == [] and not folder.exists()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "owner").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".diffdiscover3d-file.link").symlink_to(tmp_path / "data")
    with atomic_file(tmp_path / "out" / "a") as temporary:
        temporary.write_text("a")
    assert (tmp_path / "data" / "owner").exists()
