"""Full and read-only disks, as small in-memory file systems: exit code 4, existing files stay."""

import os
import subprocess
import sys

import pytest

from tests.helpers.corpus import array, blobs
from tests.helpers.training_runs import DIFFUSION, command, finish, hashes, write_scans

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of some KiB in memory: `disk(kib)`; skip where that is not allowed."""
    mounted = []

    def mount(kib: int):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def fill(folder, leave: int) -> None:
    """Fill the disk up to the given free space in KiB."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave * 1024
    (folder / "filler").write_bytes(os.urandom(free))


def content(folder) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "diffdiscover3d.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def check(done, *words):
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr and all(word in line for word in words), done.stderr


def test_results_on_a_full_disk(tmp_path, disk, tiny_discovery, count):
    folder = disk(3000)
    scan = tmp_path / "scan.nii.gz"
    array(blobs((40, 40, 40)).astype("float32"))(scan)
    for name in ("scan_dseg.nii.gz", "scan_dseg.json"):
        (folder / name).write_bytes(b"old")
    fill(folder, leave=1028)  # passes the preliminary check, but too little for the preview
    (folder / "filler2").write_bytes(bytes(1024 * 1000))
    before = content(folder)
    check(cli("segment", scan, "--model", tiny_discovery, "-o", folder, "--overwrite", "--preview"), str(folder))
    assert content(folder) == before
    (folder / "filler2").unlink()
    before = content(folder)
    done = cli("synthesize", "-n", 5, "-o", folder)  # no space for the second volume
    check(done, str(folder), "No space left")
    assert content(folder) == before
    count("full disk, results", commands=2, exit_code=4, old_files_intact=True)


def test_a_checkpoint_on_a_full_disk(tmp_path, disk, count):
    options = {**DIFFUSION, "dataset": write_scans(tmp_path / "scans"), "preview-every": 0, "max-steps": 4}
    options |= {"checkpoint-every": 1, "keep-checkpoints": 9}
    whole = tmp_path / "whole"
    assert finish(command("diffusion", {**options, "output-dir": whole})).returncode == 0
    size = sum(len(data) for data in content(whole / "checkpoints" / "checkpoint-00000001").values())

    folder = disk(int(2.5 * size / 1024))
    output = folder / "out"
    check(finish(command("diffusion", {**options, "output-dir": output})), "checkpoint-00000003", "free some space")
    steps = ("checkpoint-00000001", "checkpoint-00000002")
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == list(steps)  # no partial checkpoint
    for step in steps:
        for name, data in content(whole / "checkpoints" / step).items():
            if name.endswith(".safetensors"):
                assert (output / "checkpoints" / step / name).read_bytes() == data
    subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
    again = finish([*command("diffusion", {**options, "output-dir": output}), "--resume", "latest"])
    assert again.returncode == 0, again.stderr
    assert hashes(output) == hashes(whole)
    count("full disk, checkpoint", exit_code=4, older_checkpoints_intact=True, resumed_bit_equal=True)


def test_a_read_only_disk(tmp_path, disk, tiny_discovery, count):
    folder = disk(2000)
    scan = tmp_path / "scan.nii.gz"
    array(blobs().astype("float32"))(scan)
    (folder / "scan_dseg.json").write_bytes(b"old")
    if subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True).returncode:
        pytest.skip("cannot mount read-only here")
    commands = [
        ["segment", scan, "--model", tiny_discovery, "-o", folder / "new", "--overwrite"],
        ["features", scan, "-o", folder],
        ["generate", "-o", folder],
        ["synthesize", "-n", "1", "-o", folder],
        ["evaluate", "-o", folder / "scores.json"],
        ["convert-authors-checkpoint", scan, folder / "model"],
    ]
    for arguments in commands:
        check(cli(*arguments), str(folder))
    options = {**DIFFUSION, "dataset": tmp_path / "no-such-folder", "output-dir": folder / "out"}
    check(finish(command("diffusion", options)), str(folder))  # before the data is read
    assert content(folder) == {"scan_dseg.json": b"old"}
    count("read-only disk", commands=len(commands) + 1, exit_code=4, old_files_intact=True)
