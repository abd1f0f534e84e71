"""Termination signals become interrupts in the process, and end its forked children."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diffdiscover3d.utils.signals import interrupt_on_termination, run_child


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_interrupts_within_the_context_only(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupt_on_termination():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_on_termination():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_ends_by_the_signal():
    code = """if True:
        import os, signal, time
        from diffdiscover3d.utils.signals import interrupt_on_termination
        with interrupt_on_termination():
            ready, started = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(started, b"1")
                while True:
                    try:
                        time.sleep(60)
                    except KeyboardInterrupt:
                        pass
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(-signal.SIGTERM)


CHILD = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def save(number, frame):
    with open(place / "received", "a") as file:
        file.write(f"{number} ")
    time.sleep(0.3)  # a step is finished and saved
    (place / "saved").touch()
    sys.exit(130)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, save)
(place / "ready").touch()
for _ in range(600):
    time.sleep(0.1)
"""
PARENT = """
import os, sys
from diffdiscover3d.utils.signals import run_child
print(run_child([sys.executable, *sys.argv[1:]], os.environ))
"""


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_gets_one_signal_and_is_waited_for(tmp_path, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "-c", CHILD, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 30
    while not (tmp_path / "ready").exists() and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(parent.pid, number)  # as a terminal sends it, to the whole group
    out, _ = parent.communicate(timeout=30)
    assert out == "(130, True)\n" and (tmp_path / "saved").exists()
    assert (tmp_path / "received").read_text() == f"{int(signal.SIGTERM)} "


def test_a_child_that_ends_by_itself(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert run_child([sys.executable, "-c", "raise SystemExit(5)"], os.environ) == (5, False)
    assert signal.getsignal(signal.SIGINT) is before
