"""The examples and the commands of the README."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.loopback_hub import LoopbackHub

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def scans(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(4):
        data = rng.normal(0, 0.1, (14, 10, 12)).astype(np.float32)
        data[3:9, 2:8, 3:10] += 1 + i
        nib.save(nib.Nifti1Image(data, np.diag([-1, 1, 2, 1])), folder / f"scan{i}.nii.gz")
    return folder


def run(*command, cwd):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_features_example(scans):
    out = run(sys.executable, ROOT / "examples" / "features.py", scans / "scan0.nii.gz", cwd=scans)
    assert "stage 1: (1, 64, 6, 6, 6)" in out and "(1, 16, 14, 10, 12)" in out


def test_train_on_your_folder(scans, tmp_path):
    script, output = ROOT / "examples" / "train_on_your_folder.sh", tmp_path / "out"
    run("bash", script, scans, output, "--max-steps", "2", "--batch-size", "2", "--preview-every", "2", cwd=tmp_path)
    for i in range(4):
        labels = nib.load(output / "parts" / f"scan{i}_dseg.nii.gz")
        np.testing.assert_array_equal(labels.affine, np.diag([-1, 1, 2, 1]))
        assert labels.shape == (14, 10, 12)
    assert len(list((output / "parts").glob("*.png"))) == 4


def test_the_readmes_test_command_is_the_one_of_ci():
    readme = (ROOT / "README.md").read_text()
    test_command = 'pip install -e ".[test]" && pytest -q -n logical'
    assert test_command in readme
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", readme) if not t.startswith("http")]
    assert len(targets) > 20
    for target in targets:
        assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.mark.slow
def test_the_readmes_main_command_runs(tmp_path):
    (line,) = re.findall(r"^pip install \. && (.*)$", (ROOT / "README.md").read_text(), flags=re.M)
    run("bash", "-euo", "pipefail", "-c", line, cwd=tmp_path)
    assert (tmp_path / "demo" / "synthetic-regular-test-000_dseg.nii.gz").is_file()
    assert (tmp_path / "demo" / "synthetic-regular-test-000_dseg.png").is_file()


def test_readme_python_runs(scans, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S).group(1)
    code = (
        code.replace('"scan.nii.gz"', repr(str(scans / "scan1.nii.gz")))
        + "\nprint(coarse.shape, middle.shape, fine.shape)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    shapes = [tuple(map(int, s.split(", "))) for s in re.findall(r"\[([\d, ]+)\]", out)]
    assert [s[1] for s in shapes] == [64, 32, 16] and shapes[2][2] == 4 * shapes[0][2]


def test_push_and_pull_example(tiny_discovery, tmp_path):
    with LoopbackHub() as hub:
        clean = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "push_and_pull.py"), str(tiny_discovery), "user/parts"],
            capture_output=True,
            text=True,
            env={**clean, **hub.environment(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1:] == ["3 parts from user/parts", "same weights: True"]
        assert hub.repos["models", "user/parts"].private


@pytest.mark.parametrize("name", ["multi_gpu", "multi_node"])
def test_launch_files_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(ROOT / "examples" / "launch" / f"{name}.yaml"))
    assert config.distributed_type == DistributedType.MULTI_GPU and config.mixed_precision == "bf16"
    assert config.num_processes == 8 * config.num_machines


TINY = [
    "diffusion", "--preset", "small", "--width", "8", "--sample-size", "16", "--max-steps", "2", "--batch-size", "2",
    "--preview-every", "0", "--mixed-precision", "no",
]  # fmt: skip


@pytest.mark.slow
def test_multi_gpu_launch_file(scans, tmp_path):
    """Two processes on the CPU with the launch file, except for the number of processes."""
    config = ROOT / "examples" / "launch" / "multi_gpu.yaml"
    launch = ["accelerate", "launch", "--config_file", config, "--num_processes", 2, "--mixed_precision", "no"]
    launch += ["--main_process_port", 0]
    done = subprocess.run(
        [str(c) for c in [*launch, "-m", "diffdiscover3d.train", *TINY, "--dataset", scans, "--output-dir", "out"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.slow
def test_slurm_script_with_stand_ins(scans, tmp_path):
    """Replacements: `srun` runs its command locally, `scontrol` returns this host; one node, two processes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nshift\nSLURM_NODEID=0 exec "$@"\n')
    (tools / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho other\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tools}:{ENVIRONMENT['PATH']}", "ACCELERATE_USE_CPU": "true"}
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "MAIN_PORT": "29617"}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "launch" / "slurm.sh"), *TINY, "--dataset", str(scans), "--output-dir", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize(("first", "last"), [(1, 8), (0, 7), (11, 18)])
def test_slurm_array_script_gives_each_task_its_share(tmp_path, first, last):
    """A stand-in for `diffdiscover3d` that prints its arguments."""
    tool = tmp_path / "diffdiscover3d"
    tool.write_text("#!/bin/bash\nprintf '%s|' \"$@\"\n")
    tool.chmod(0o755)
    script, shares = ROOT / "examples" / "launch" / "segment_array.sh", []
    for task in range(first, last + 1):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
        environment |= {"SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_MAX": str(last)}
        command = ["bash", str(script), "my scans", "-o", "parts"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        words = done.stdout.split("|")
        assert words[:5] == ["segment", "my scans", "-o", "parts", "--share"] and words[6:8] == [
            "--summary",
            "--resume",
        ]
        shares.append(words[5])
    assert shares == [f"{i}/8" for i in range(1, 9)]
    outside = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert outside.returncode != 0 and "sbatch --array=1-N" in outside.stderr
    gaps = {**environment, "SLURM_ARRAY_TASK_COUNT": "4"}
    done = subprocess.run(command, capture_output=True, text=True, env=gaps)
    assert done.returncode == 2 and "without gaps" in done.stderr and not done.stdout
