"""Work is shared only among processes that really joined."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from diffdiscover3d.utils import processes
from diffdiscover3d.utils.processes import rank_and_world_size

CODE = "from diffdiscover3d.utils.processes import rank_and_world_size as f; import os; os.write(1, b'%d %d\\n' % f())"


@pytest.mark.parametrize("left_over", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": "1"}, {"LOCAL_RANK": "2"}])
def test_variables_that_are_left_over(monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world_size() == (0, 1)


def test_processes_that_never_join(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="did not join within 1 s"):
        rank_and_world_size(timeout_seconds=1)


def test_two_launched_processes():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run([*launch, sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert sorted(done.stdout.split("\n")) == ["", "0 2", "1 2"], done.stderr


def test_a_process_group_stays_in_memory_after_it_was_destroyed(monkeypatch):
    """Otherwise gloo's destructor can wait for ever for a thread that waits for the interpreter's lock."""
    monkeypatch.setattr(processes, "_KEPT", [])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    processes.keep_process_group()
    dist.destroy_process_group()
    (kept,) = processes._KEPT
    assert kept is group and not dist.is_initialized()


@pytest.mark.parametrize("launched", [True, False])
def test_a_launched_process_ends_without_finalization(launched):
    code = (
        "import atexit; from diffdiscover3d.utils.processes import exit_process; "
        "atexit.register(print, 'finalized'); print('saved', end=' '); exit_process(3)"
    )
    names = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    environment = {**os.environ, **(names if launched else {})}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (3, "saved " if launched else "saved finalized\n"), done.stderr
