"""The command line itself: help, usage errors, synthetic cells."""

import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

import diffdiscover3d
from diffdiscover3d.cli import app as cli
from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS, synthesize
from diffdiscover3d.errors import InputError, MemoryLimitError, ModelError, NetworkError, OutputError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffdiscover3d", *map(str, arguments)])
        monkeypatch.setattr(cli, "_debug", False)
        monkeypatch.setenv("COLUMNS", "120")
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, re.sub(r"\x1b\[[0-9;]*m", "", printed.out), printed.err

    return call


COMMANDS = [
    *("segment", "features", "generate", "discover", "report"),
    *("synthesize", "evaluate", "models", "doctor"),
]


def test_help_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "diffdiscover3d.cli", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stderr == ""
    for command in COMMANDS:
        assert command in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from diffdiscover3d.cli import app as cli; sys.argv[1:] = ['--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'monai', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(run, command):
    code, out, err = run(command, "--help")
    assert code == 0 and "Usage" in out and err == ""


def test_version(run):
    assert run("--version") == (0, f"diffdiscover3d {diffdiscover3d.__version__}\n", "")


def test_models_list_runs(run):
    code, _, err = run("models", "list")
    assert code == 0 and err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment"],
        ["segment", "a.nii.gz", "--level", "4"],
        ["segment", "a.nii.gz", "--no-such-option"],
        ["segment", "a.nii.gz", "--volume", "one"],
        ["nonsense"],
        ["synthesize", "-n", "0"],
    ],
)
def test_usage_errors(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err and "Usage" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["synthesize", "--variant", "round"], "variant"),
        (["synthesize", "--split", "all"], "split"),
        (["generate", "--sampler", "euler"], "sampler"),
        (["generate", "--grid", "8", "--grid", "9"], "grid"),
        (["segment", "a.nii.gz", "--device", "toaster"], "device"),
    ],
)
def test_values_out_of_range_are_usage_errors(run, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("x"), 3),
        (OutputError("x"), 4),
        (ModelError("x"), 5),
        (NetworkError("x"), 6),
        (MemoryLimitError("x"), 7),
        (ValueError("x"), 2),
    ],
)
def test_exit_codes(run, monkeypatch, error, expected):
    import diffdiscover3d.workflows.synthesize as module

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, "write_synthetic", fail)
    assert run("synthesize") == (expected, "", "error: x\n")
    with pytest.raises(type(error)):
        run("--debug", "synthesize")


def test_interrupt_ends_with_130(run, monkeypatch):
    import diffdiscover3d.workflows.synthesize as module

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_synthetic", stop)
    code, out, err = run("synthesize")
    assert code == 130 and out == "" and "Traceback" not in err


def test_debug_shows_where_a_bad_file_was_found(run, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        run("--debug", "segment", tmp_path / "missing.nii.gz")


def test_synthesize(run, tmp_path):
    code, out, err = run("synthesize", "-n", 2, "--variant", "irregular", "--split", "validation", "-o", tmp_path / "c")
    assert code == 0 and err == ""
    stems = [f"synthetic-irregular-validation-{i:03d}" for i in range(2)]
    assert out.split() == [str(tmp_path / "c" / f"{stem}.nii.gz") for stem in stems]
    expected = [f"{stem}{end}.nii.gz" for stem in stems for end in ("", *(f"_level-{x}_truth" for x in LEVEL_PARTS))]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(expected)
    for index, stem in enumerate(stems):
        sample = synthesize("irregular", "validation", index)
        image = nib.load(tmp_path / "c" / f"{stem}.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(), sample.volume)
        np.testing.assert_array_equal(image.affine, np.eye(4))
        for level in LEVEL_PARTS:
            labels = nib.load(tmp_path / "c" / f"{stem}_level-{level}_truth.nii.gz")
            assert labels.get_data_dtype() == np.uint8 and labels.header["intent_code"] == 1002
            np.testing.assert_array_equal(np.asarray(labels.dataobj), sample.labels[level - 1])


def test_synthesize_refuses_existing_files_before_it_writes(run, tmp_path):
    old = tmp_path / "synthetic-regular-test-001_level-2_truth.nii.gz"
    old.write_bytes(b"old")
    code, out, err = run("synthesize", "-n", 2, "-o", tmp_path)
    assert code == 4 and out == "" and err == f"error: {old}: already exists; use --overwrite to replace it.\n"
    assert list(tmp_path.iterdir()) == [old] and old.read_bytes() == b"old"
    assert run("synthesize", "-n", 2, "-o", tmp_path, "--overwrite")[0] == 0
    assert len(list(tmp_path.iterdir())) == 8 and nib.load(old).shape == (50, 50, 50)


@pytest.mark.parametrize("command", ["synthesize", "generate"])
def test_output_folder_that_is_a_file(run, tmp_path, command):
    (tmp_path / "file").write_text("x")
    code, out, err = run(command, "-o", tmp_path / "file" / "out")
    assert code == 4 and out == "" and len(err.splitlines()) == 1 and "is not a folder" in err


def test_a_converted_checkpoint_is_written_atomically(run, tmp_path, monkeypatch):
    from diffdiscover3d.hub.registry import load_teacher
    from diffdiscover3d.models.unet_3d import UNet3DModel
    from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline

    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
    monkeypatch.setattr("diffdiscover3d.models.authors_checkpoint.load_authors_checkpoint", lambda path: unet)
    save = DiffusionFeaturePipeline.save_pretrained

    def half(self, folder):
        save(self, folder)
        (folder / "unet" / "config.json").unlink()
        raise OSError(28, "No space left on device")

    def files(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    output = tmp_path / "model"
    monkeypatch.setattr(DiffusionFeaturePipeline, "save_pretrained", half)
    code, _, err = run("convert-authors-checkpoint", "a.pt", output)
    assert code == 4 and "No space left" in err and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(DiffusionFeaturePipeline, "save_pretrained", save)
    assert run("convert-authors-checkpoint", "a.pt", output)[:2] == (0, f"{output}\n")
    assert load_teacher(str(output)).unet.config.width == 8
    (output / "notes.txt").write_text("mine")
    before = files(output)
    assert run("convert-authors-checkpoint", "a.pt", output)[0] == 4
    monkeypatch.setattr(DiffusionFeaturePipeline, "save_pretrained", half)
    assert run("convert-authors-checkpoint", "a.pt", output, "--overwrite")[0] == 4
    assert files(output) == before
    monkeypatch.setattr(DiffusionFeaturePipeline, "save_pretrained", save)
    unet.conv_out.weight.data += 1
    assert run("convert-authors-checkpoint", "a.pt", output, "--overwrite")[0] == 0
    changed = {p.name for p, data in files(output).items() if before[p] != data}
    assert changed == {"diffusion_pytorch_model.safetensors", "checksums.json"}  # and the folder's other files remain
    assert load_teacher(str(output)).unet.conv_out.weight.equal(unet.conv_out.weight)


def test_memory_that_runs_out_in_torch_itself(run, tmp_path):
    code, out, err = run("generate", "--grid", 30_000, "--steps", 1, "-o", tmp_path / "out")
    assert (code, out) == (7, "") and err == "error: out of memory; resample the volume or use a larger machine.\n"
    assert not (tmp_path / "out").exists()


def test_train_is_the_training_command(tmp_path, monkeypatch):
    """The same options, errors and exit codes; its help imports nothing heavy."""
    monkeypatch.chdir(tmp_path)
    for line, code in (("diffusion --max_steps 0", 2), ("diffusion --dataset no-such-folder", 3), ("discovery", 2)):
        assert CliRunner().invoke(cli.app, ["train", *line.split()]).exit_code == code, line
    result = CliRunner().invoke(cli.app, ["train", "discovery", "--help"])
    assert result.exit_code == 0 and "--num-parts" in result.output and "accelerate launch" in result.output
    code = (
        "import sys\nsys.argv = ['diffdiscover3d', 'train', 'diffusion', '--help']\n"
        "from diffdiscover3d.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'monai', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage: diffdiscover3d train diffusion") and done.stdout.strip().endswith("[]")
