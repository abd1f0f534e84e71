"""Memory limits of containers and batch jobs, from files as the kernel writes them, and of `ulimit -v`."""

import resource
import subprocess
import sys

import psutil
import pytest

from diffdiscover3d.utils import memory

UNLIMITED = 9223372036854771712  # of a group of version 1 without a limit


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files of a fake system: `system({"sys/...": text, "proc/cgroup": text})`."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "sys")
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "proc")
    (tmp_path / "proc").mkdir()

    def write(files: dict) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def free() -> int:
    return memory.free_memory()


def test_no_groups(system):
    assert free() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_version_2_in_a_container(system):
    system({"sys/memory.max": 9000, "sys/memory.current": 5000, "proc/cgroup": "0::/"})
    assert free() == 4000
    system({"sys/memory.stat": "anon 3000\ninactive_file 1500\nfile 2000"})  # cached files are given up
    assert free() == 5500


def test_version_2_on_a_host_with_a_limit_further_out(system):
    job = "sys/system.slice/slurmstepd.scope/job_7"
    system({"proc/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/task_1"})
    system({f"{job}/step_0/task_1/memory.max": "max", f"{job}/step_0/task_1/memory.current": 100})
    system({f"{job}/step_0/memory.max": 8000, f"{job}/step_0/memory.current": 1000})
    system({f"{job}/memory.max": 7000, f"{job}/memory.current": 1500})
    assert free() == 5500


@pytest.mark.parametrize("place", ["", "/docker/0123abc"])  # inside a container, and on the host
def test_version_1(system, place):
    system({"proc/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/0123abc\n0::/system.slice/containerd.service"})
    group = f"sys/memory{place}"
    system({f"{group}/memory.limit_in_bytes": UNLIMITED, f"{group}/memory.usage_in_bytes": 4000})
    assert free() > 2**20
    system({f"{group}/memory.limit_in_bytes": 6000, f"{group}/memory.stat": "cache 900\ntotal_inactive_file 700"})
    assert free() == 2700


def test_more_used_than_allowed(system):
    system({"sys/memory.max": 4000, "sys/memory.current": 5000})
    assert free() == 0


@pytest.mark.parametrize("text", ["", "nonsense", "0::/../../etc\n5:memory:/../..", "5:memory"])
def test_damaged_files(system, text):
    system({"proc/cgroup": text, "sys/memory.max": "many", "sys/memory.current": ""})
    assert free() > 2**20


def test_an_address_space():
    limit = 3 * 2**30
    code = "from diffdiscover3d.utils.memory import free_memory; print(free_memory())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0 and 2**30 < int(done.stdout) < limit, done.stderr
