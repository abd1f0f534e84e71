"""A folder is locked by one process at a time, and free when that process has ended."""

import os
import signal
import subprocess
import sys

import pytest

from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils.locks import locked_folder
from diffdiscover3d.utils.staging import recover_folder

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


FORK = """
import os, sys, time
from diffdiscover3d.utils.locks import locked_folder
from diffdiscover3d.utils.staging import staged_folder
with locked_folder(sys.argv[1]), staged_folder(sys.argv[1]) as staging:
    (staging / "half").touch()
    if os.fork() == 0:  # as a data-loading worker
        print("forked", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_that_outlives_the_holder_keeps_no_lock(tmp_path):
    code = [sys.executable, "-c", FORK, str(tmp_path)]
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "forked\n"
            with pytest.raises(OutputError, match="another process is writing"), locked_folder(tmp_path):
                pass
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            with locked_folder(tmp_path):
                recover_folder(tmp_path)
            assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path):
        raise ZeroDivisionError
    with locked_folder(tmp_path):
        pass


def test_a_folder_that_was_created_for_the_lock_is_removed_if_it_stays_empty(tmp_path):
    with locked_folder(tmp_path / "new" / "out"):
        assert [p.name for p in (tmp_path / "new" / "out").iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with locked_folder(tmp_path / "old"), locked_folder(tmp_path / "used"):
        (tmp_path / "used" / "model").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", ".lock", "model", "old", "used"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), locked_folder(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").is_file()
