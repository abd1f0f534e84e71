"""A folder is locked by one process at a time, and free when that process has ended."""

import os
import signal
import subprocess
import sys

import pytest

from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils.locks import locked_folder

HOLD = """
import sys, time
from diffdiscover3d.utils.locks import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process is writing"), locked_folder(tmp_path):
            pass
        os.kill(process.pid, signal.SIGKILL)
    with locked_folder(tmp_path):
        pass


def test_the_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path):
        raise ZeroDivisionError
    with locked_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(OutputError, match="cannot be created"), locked_folder(tmp_path / "absent"):
        pass
