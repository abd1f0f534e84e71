"""Termination signals become interrupts in the process, and end its forked children."""

import os
import signal
import subprocess
import sys

import pytest

from diffdiscover3d.utils.signals import interrupt_on_termination


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
