"""Accepted and rejected resumes, and stopping on signals."""

import json
import os
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.errors import InputError, ModelError, OutputError
from diffdiscover3d.train import run
from diffdiscover3d.training import checkpoints
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.fingerprints import dataset_fingerprint, weights_fingerprint
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train
from diffdiscover3d.utils.signals import StopRequest, TrainingInterrupted
from tests.helpers.brats_folders import make_brats
from tests.helpers.training_runs import DIFFUSION, DISCOVERY, command, finish, hashes, log_steps, start, write_scans


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    """Reset accelerate's process-wide state, which may have another precision from earlier tests."""
    AcceleratorState._reset_state(reset_partial_state=True)


def plain(options):
    return {k.replace("-", "_"): v for k, v in options.items()}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "scans")


@pytest.fixture(scope="module")
def teacher(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    run(diffusion(scans, output, max_steps=2))
    return output


def diffusion(scans, output, **options):
    options = {**plain(DIFFUSION), "dataset": str(scans), "output_dir": str(output), "preview_every": 0, **options}
    return make_config(DiffusionConfig, **options)


def discovery(scans, teacher, output, **options):
    options = {**plain(DISCOVERY), "dataset": str(scans), "teacher": str(teacher), "preview_every": 0, **options}
    return make_config(DiscoveryConfig, **{**options, "output_dir": str(output)})


# identity of data and models


def test_data_may_move_but_not_change(scans, tmp_path):
    output, moved = tmp_path / "out", tmp_path / "moved"
    run(diffusion(scans, output, max_steps=2))
    shutil.copytree(scans, moved)
    run(diffusion(moved, output, max_steps=2, resume="latest"))
    image = nib.load(moved / "scan2.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) + 1, image.affine), moved / "scan2.nii.gz")
    with pytest.raises(ModelError, match=r"different dataset.*--dataset"):
        run(diffusion(moved, output, max_steps=2, resume="latest"))
    with pytest.raises(ModelError, match="different dataset"):
        run(diffusion("synthetic-regular", output, max_steps=2, resume="latest"))


def test_the_teacher_may_move_but_not_change(scans, teacher, tmp_path):
    output, moved = tmp_path / "out", tmp_path / "moved"
    run(discovery(scans, teacher, output, max_steps=2))
    shutil.copytree(teacher, moved)
    run(discovery(scans, moved, output, max_steps=2, resume="latest"))
    run(diffusion(scans, tmp_path / "other", max_steps=2, seed=1))
    with pytest.raises(ModelError, match=r"different teacher.*--teacher"):
        run(discovery(scans, tmp_path / "other", output, max_steps=2, resume="latest"))


def test_fingerprints(scans, tmp_path):
    first = dataset_fingerprint(load_volumes(str(scans)))
    assert first == dataset_fingerprint(load_volumes(f"{scans}/*.nii.gz"))
    fewer = tmp_path / "fewer"
    shutil.copytree(scans, fewer)
    (fewer / "scan0.nii.gz").unlink()
    named = [("synthetic-regular", "train"), ("synthetic-regular", "test"), ("synthetic-irregular", "train")]
    names = [dataset_fingerprint(load_volumes(*name)) for name in named]
    assert len({first, dataset_fingerprint(load_volumes(str(fewer))), *names}) == 5
    assert dataset_fingerprint([1, 2]) is None
    one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert weights_fingerprint(one) != weights_fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert weights_fingerprint(one) == weights_fingerprint(two)
    assert weights_fingerprint(one) != weights_fingerprint(two.to(torch.bfloat16))


def test_every_dataset_has_a_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))
    names = ["synthetic", "synthetic-regular", "synthetic-irregular"]
    joined, regular, irregular = [dataset_fingerprint(load_volumes(name)) for name in names]
    assert regular in joined and irregular in joined and joined not in (regular, irregular)
    cells = load_volumes("synthetic", "test")
    half = len(cells) // 2
    assert [cells[i]["name"] for i in (half - 1, half)] == [f"regular-test-{half - 1:03d}", "irregular-test-000"]
    root = make_brats(tmp_path / "brats", "2021")
    first = dataset_fingerprint(load_volumes(str(root)))
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert dataset_fingerprint(load_volumes(str(moved))) == first
    t1 = dataset_fingerprint(load_volumes(str(root), brats=BraTSOptions(modality="t1")))
    validation = dataset_fingerprint(load_volumes(str(root), "validation"))
    changed = load_volumes(str(moved)).cases[0].image("flair")
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert len({first, t1, validation, dataset_fingerprint(load_volumes(str(moved)))}) == 4


def test_datasets_of_the_hub_have_fingerprints(tmp_path):
    datasets = pytest.importorskip("datasets")
    from diffdiscover3d.data.datasets.builders import as_training_volumes

    rows = np.random.default_rng(0).random((4, 5, 6, 7), dtype=np.float32)
    tables = [datasets.Dataset.from_dict({"volume": list(kept)}) for kept in (rows, rows, rows[:3], 1 - rows)]
    found = [dataset_fingerprint(as_training_volumes(table, tmp_path / str(i))) for i, table in enumerate(tables)]
    assert found[0] == found[1] and len(set(found)) == 3 and None not in found


class _Bare:
    """Volumes without a fingerprint."""

    def __init__(self, volumes):
        self.volumes = [volumes[i] for i in range(len(volumes))]

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, index):
        return self.volumes[index]


def test_data_without_a_fingerprint_are_known_by_name(scans, tmp_path):
    volumes = load_volumes(str(scans))

    def go(identity, **options):
        config = diffusion(**{"scans": scans, "output": tmp_path, "max_steps": 1, **options})
        train(DiffusionTraining(config, (10, 8, 12)), config, _Bare(volumes), make_accelerator(config), identity)

    go({"dataset": None})
    go({"dataset": None}, resume="latest")
    go(None, resume="latest")
    with pytest.raises(ModelError, match="different dataset"):
        go({"dataset": None}, scans="elsewhere", resume="latest")
    with pytest.raises(ModelError, match="different dataset"):
        go({"dataset": dataset_fingerprint(volumes)}, resume="latest")


# options


def test_written_options_are_compared_even_without_a_checkpoint(scans, tmp_path):
    run(diffusion(scans, tmp_path, max_steps=1))
    shutil.rmtree(tmp_path / "checkpoints")  # as if killed before the first checkpoint
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"train_config\.json belongs to a different training \(seed was 0 and is 1\)"):
        run(diffusion(scans, tmp_path, max_steps=1, seed=1, resume="latest"))
    run(diffusion(scans, tmp_path, max_steps=1, resume="latest", log_every=5))  # this option may change
    written = json.loads((tmp_path / "train_config.json").read_text())
    assert written["log_every"] == 5
    (tmp_path / "train_config.json").write_text('{"seed": ')
    with pytest.raises(ModelError, match=r"train_config\.json: cannot be read.*remove it"):
        run(diffusion(scans, tmp_path, max_steps=1, resume="latest"))
    (tmp_path / "train_config.json").unlink()
    run(diffusion(scans, tmp_path, max_steps=1, resume="latest"))


def test_a_model_in_the_folder_is_not_written_over(scans, tmp_path):
    run(diffusion(scans, tmp_path, max_steps=1))
    shutil.rmtree(tmp_path / "checkpoints")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=r"already contains a model.*--output-dir"):
        run(diffusion(scans, tmp_path, max_steps=1))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_earlier_checkpoint_does_not_replace_later_ones(scans, tmp_path):
    steps = {"max_steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4}
    run(diffusion(scans, tmp_path / "out", **steps))
    before, kept = everything(tmp_path / "out"), tmp_path / "out" / "checkpoints"
    second = str(kept / "checkpoint-00000002")
    with pytest.raises(ModelError, match=r"later checkpoints, up to checkpoint-00000004.*--output-dir, or remove"):
        run(diffusion(scans, tmp_path / "out", **steps, resume=second))
    assert everything(tmp_path / "out") == before
    run(diffusion(scans, tmp_path / "branch", **steps, resume=second))
    assert hashes(tmp_path / "branch") == hashes(tmp_path / "out")
    branch = everything(tmp_path / "branch")
    with pytest.raises(ModelError, match="already contains a training"):  # without --resume
        run(diffusion(scans, tmp_path / "branch", **steps, resume=str(kept / "checkpoint-00000004")))
    assert everything(tmp_path / "branch") == branch


def test_only_what_is_damaged_is_removed_and_said(scans, tmp_path, caplog):
    steps = {"max_steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4}
    run(diffusion(scans, tmp_path, **steps))
    whole, kept = hashes(tmp_path), tmp_path / "checkpoints"
    for step in (3, 4):
        (kept / f"checkpoint-0000000{step}" / "state.json").write_text("{")
    run(diffusion(scans, tmp_path, **steps, resume="latest"))
    assert hashes(tmp_path) == whole and len(list(kept.iterdir())) == 4
    removed = [r.getMessage() for r in caplog.records if r.getMessage().startswith("removing")]
    assert len(removed) == 2 and "damaged checkpoint" in removed[0] and removed[0].endswith("checkpoint-00000003")


def test_latest_without_checkpoints_does_not_start_over_a_model(scans, tmp_path):
    run(diffusion(scans, tmp_path, max_steps=1))
    shutil.rmtree(tmp_path / "checkpoints")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"already contains a model.*--output-dir"):
        run(diffusion(scans, tmp_path, max_steps=1, resume="latest"))
    assert everything(tmp_path) == before


def test_a_folder_is_refused_before_any_volume_is_read(scans, tmp_path, monkeypatch):
    run(diffusion(scans, tmp_path / "out", max_steps=1))
    monkeypatch.setattr("diffdiscover3d.data.loading.load_volumes", None)  # must not be called
    with pytest.raises(ModelError, match="already contains a training"):
        run(diffusion(scans, tmp_path / "out", max_steps=1))
    with pytest.raises(ModelError, match="seed was 0 and is 1"):
        run(diffusion(scans, tmp_path / "out", max_steps=1, seed=1, resume="latest"))


def test_the_split_of_a_training_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))
    five, six = (make_brats(tmp_path / str(n), "2021", count=n) for n in (5, 6))
    options = {"max_steps": 1, "crop": (20, 22, 19), "batch_size": 2}
    run(diffusion(five, tmp_path / "out", **options))
    before = everything(tmp_path / "out")
    assert sum(map(len, json.loads((tmp_path / "out" / "split.json").read_text()).values())) == 5
    for resume, message in ((None, "already contains"), ("latest", "different dataset")):
        with pytest.raises(ModelError, match=message):
            run(diffusion(six, tmp_path / "out", **options, resume=resume))
        assert everything(tmp_path / "out") == before


def test_batch_norm_wants_as_many_volumes_at_a_time_as_before(scans, teacher, tmp_path):
    run(discovery(scans, teacher, tmp_path / "batch", max_steps=1, norm="batch"))
    again = {"max_steps": 1, "resume": "latest", "gradient_accumulation_steps": 2}
    with pytest.raises(ModelError, match="over 4 volumes and would now be over 2"):
        run(discovery(scans, teacher, tmp_path / "batch", norm="batch", **again))
    run(discovery(scans, teacher, tmp_path / "instance", max_steps=1, norm="instance"))
    run(discovery(scans, teacher, tmp_path / "instance", norm="instance", **again))


def test_a_start_brings_its_own_norm_and_dropout(scans, teacher, tmp_path):
    run(discovery(scans, teacher, tmp_path / "start", max_steps=1, norm="instance", dropout=0.1))
    start = {"init_from": str(tmp_path / "start"), "max_steps": 1}
    with pytest.raises(ValueError, match=r"`norm` must be that of --init-from, 'instance'.*--norm instance"):
        run(discovery(scans, teacher, tmp_path / "a", norm="batch", dropout=0.1, **start))
    with pytest.raises(ValueError, match=r"`dropout` must be that of --init-from, 0\.1, got 0\.2"):
        run(discovery(scans, teacher, tmp_path / "a", **start))
    assert not (tmp_path / "a").exists()
    run(discovery(scans, teacher, tmp_path / "a", norm="instance", dropout=0.1, **start))


def test_a_bad_scan_is_named_before_anything_is_trained(scans, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(scans, bad)
    whole = (bad / "scan4.nii.gz").read_bytes()
    (bad / "scan4.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"scan4\.nii\.gz.*copy it again"):
        run(diffusion(bad, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# signals


class _Stopped(DiffusionTraining):
    """Sends a signal to its own process after a given step."""

    def __init__(self, *arguments, number, step):
        super().__init__(*arguments)
        self.number, self.step = number, step

    def after_step(self, step):
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return super().after_step(step)


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_step_be_saved(scans, tmp_path, number):
    volumes = load_volumes(str(scans))
    run(diffusion(scans, tmp_path / "whole", max_steps=5, checkpoint_every=99))
    config = diffusion(scans, tmp_path / "cut", max_steps=5, checkpoint_every=99)
    before = signal.getsignal(number)
    task = _Stopped(config, (10, 8, 12), number=number, step=2)
    with pytest.raises(TrainingInterrupted, match="interrupted after step 3; --resume latest"):
        train(task, config, volumes, make_accelerator(config), {"dataset": dataset_fingerprint(volumes)})
    assert signal.getsignal(number) is before
    assert hashes(tmp_path / "cut")["step"] == 3  # the signal arrived during the third step
    assert not (tmp_path / "cut" / "model_index.json").exists()
    run(diffusion(scans, tmp_path / "cut", max_steps=5, checkpoint_every=99, resume="latest"))
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_all_processes_wait_for_the_one_that_saves(scans, tmp_path, monkeypatch):
    config, events = diffusion(scans, tmp_path, max_steps=5, checkpoint_every=99), []
    accelerator = make_accelerator(config)
    save, wait, end = checkpoints.save_checkpoint, accelerator.wait_for_everyone, accelerator.end_training
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *a: (save(*a), events.append("saved")))
    monkeypatch.setattr(accelerator, "wait_for_everyone", lambda: (wait(), events.append("waited")))
    monkeypatch.setattr(accelerator, "end_training", lambda: (end(), events.append("ended")))
    task = _Stopped(config, (10, 8, 12), number=signal.SIGTERM, step=2)
    with pytest.raises(TrainingInterrupted):
        train(task, config, load_volumes(str(scans)), accelerator)
    assert events[events.index("saved") :] == ["saved", "waited", "ended"]


def test_a_second_signal_ends_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopRequest(num_processes=2) as stop:  # the launcher repeats the signal
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_sigterm_to_the_whole_group_of_a_real_training(scans, tmp_path):
    options = {**DIFFUSION, "dataset": scans, "output-dir": tmp_path / "out", "max-steps": 100_000}
    options |= {"preview-every": 0, "num-workers": 1}  # the data-loading worker receives the signal too
    process = start(command("diffusion", options))
    try:
        while log_steps(tmp_path / "out") < 3:
            assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("interrupted after step") and "Traceback" not in errors
    saved = hashes(tmp_path / "out")["step"]
    assert saved == log_steps(tmp_path / "out") and str(saved) in last


def test_weights_that_are_not_finite_are_never_saved(scans, tmp_path):
    class Broken(DiffusionTraining):
        def after_step(self, step):
            if step == 3:
                with torch.no_grad():
                    next(self.model.parameters()).fill_(float("nan"))
            return super().after_step(step)

    config = diffusion(scans, tmp_path, max_steps=9, checkpoint_every=1)
    with pytest.raises(ModelError, match="weights of step 3 are not finite"):
        train(Broken(config, (10, 8, 12)), config, load_volumes(str(scans)), make_accelerator(config))
    assert hashes(tmp_path)["step"] == 2


def test_two_processes_share_the_reading(scans, tmp_path, monkeypatch):
    """Each process reads its share of the files, and both report the invalid one."""
    script = (
        "import os, sys; from diffdiscover3d.data.datasets import folder; from diffdiscover3d.train import main\n"
        "read = folder.read_volume\n"
        "def counted(path, **options):\n"
        "    with open('read-' + os.environ['RANK'], 'a') as file:\n"
        "        file.write(path.name + ' ')\n"
        "    return read(path, **options)\n"
        "folder.read_volume = counted\n"
        "sys.exit(main())\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counted.py").write_text(script)
    bad = tmp_path / "bad"
    shutil.copytree(scans, bad)
    (bad / "scan5.nii.gz").write_bytes(b"<html>")
    options = {**DIFFUSION, "dataset": bad, "output-dir": tmp_path / "out"}
    done = finish(command("diffusion", options, processes=2, module=str(tmp_path / "counted.py")))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert (tmp_path / "read-0").read_text().split() == ["scan0.nii.gz", "scan2.nii.gz", "scan4.nii.gz"]
    assert (tmp_path / "read-1").read_text().split() == ["scan1.nii.gz", "scan3.nii.gz", "scan5.nii.gz"]
    # the first process reports the error although it did not read the invalid file
    assert any("scan5.nii.gz" in line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_a_training_goes_on_from_what_it_was_started_from(scans, teacher, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        run(discovery(scans, teacher, tmp_path / name, max_steps=1, seed=seed))
    run(discovery(scans, teacher, tmp_path / "out", max_steps=1, init_from=str(tmp_path / "one")))
    before = everything(tmp_path / "out")
    with pytest.raises(ModelError, match=r"different init_from; give a --init-from"):
        run(discovery(scans, teacher, tmp_path / "out", max_steps=1, init_from=str(tmp_path / "two"), resume="latest"))
    assert everything(tmp_path / "out") == before
    (tmp_path / "one").rename(tmp_path / "moved")
    run(discovery(scans, teacher, tmp_path / "out", max_steps=1, init_from=str(tmp_path / "moved"), resume="latest"))
