"""The progress bar: shown only on terminals."""

import os
import re
import subprocess
import sys

import pytest
from rich.console import Console, ConsoleDimensions

from diffdiscover3d.utils.progress import ProgressBar


def work(**options):
    with ProgressBar(total=6, **options) as stages:
        for number in range(2):
            stages.begin_case(f"scan {number + 1} of 2", 3)
            stages.show("reading the scan", "loss 0.5")
            stages.done()
        return stages


def test_silent_when_piped(capsys):
    work()
    work(enabled=False, force=True)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "size", ConsoleDimensions(140, 25))
    work(force=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "scan 2 of 2: reading the scan" in printed.err and "left" in printed.err and "loss 0.5" in printed.err


def test_what_a_case_did_not_need_leaves_the_total():
    stages = work(enabled=False)
    (task,) = stages._bar.tasks
    assert (task.completed, task.total) == (2, 4)  # two of the three steps of the first case were skipped


def test_a_share_of_a_long_step(capfd):
    with ProgressBar(total=4, force=True) as stages:
        stages.begin_case("scan 1 of 1", 4)
        stages.done()
        stages.within(3, 4, "window")
        task = stages._bar.tasks[0]
        assert task.completed == 1.75 and task.fields["details"] == "window 3 of 4"
        stages.done()
        assert task.completed == 2


def test_numbers_stay_readable_on_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "size", ConsoleDimensions(80, 25))
    with ProgressBar(total=120, force=True) as bar:
        bar.begin_case("scan 113 of 116", 5)
        bar.show("finding the parts of level 2, which takes long", "loss 0.5")
        bar.done(42)
        bar._bar.refresh()
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in re.split("[\r\n]+", text) if "scan 113" in line]
    assert lines and max(map(len, lines)) <= 80
    assert "scan 113 of 116: finding the par" in lines[-1] and re.search(r" 42/120 +left +[-:0-9]{7}", lines[-1])


BAR = """
import sys
from diffdiscover3d.utils.progress import ProgressBar
from diffdiscover3d.utils.terminal import say
say("Step 1 of 2: learning what your scans look like")
sys.stdin.readline()  # until the line above has been read
with ProgressBar(total=40) as bar:
    for number in range(40):
        bar.show("training, diffusion", "loss 0.1234  learning rate 0.0008")
        bar.done()
"""


def test_on_a_pseudo_terminal_of_80_columns():
    """What `discover` shows, on a real terminal: steps at once, and a bar in a line of its own."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    child = subprocess.Popen([sys.executable, "-c", BAR], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    while b"look like" not in text:
        text += os.read(ours, 1000)
    os.write(ours, b"\n")
    while True:
        try:
            text += os.read(ours, 1000)
        except OSError:  # closed by the child's end
            break
    os.close(ours)
    assert child.wait() == 0
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", text.decode())
    lines = [line for line in re.split("[\r\n]+", plain) if line.strip()]
    assert lines[0] == "Step 1 of 2: learning what your scans look like"
    bars = [line for line in lines if "training, diffusion" in line]
    assert bars and {len(line) for line in bars} == {80}
    assert re.search(r"40/40 +left 0:00:00", bars[-1]) and "loss" not in plain


def test_through_a_pipe_steps_are_printed_at_once():
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BAR], **options) as child:
        assert child.stdout.readline() == "Step 1 of 2: learning what your scans look like\n"  # it is still waiting
        assert child.poll() is None
        assert child.communicate("\n") == ("", "")  # no bar
    assert child.returncode == 0


def test_the_callback_gets_share_and_operation():
    calls = []
    with ProgressBar(total=4, enabled=False, callback=lambda *call: calls.append(call)) as stages:
        stages.begin_case("scan 1 of 2", 3)
        stages.show("reading the scan", "details")
        stages.done()
        stages.within(1, 4, "window")
        stages.done()
        stages.begin_case("scan 2 of 2", 1)  # the first did not need its third step
        stages.done()
    read, total = "reading the scan", 3
    assert calls == [(0, read), (1 / 4, read), (1.25 / 4, read), (2 / 4, read), (1, read)] and total == stages._total
