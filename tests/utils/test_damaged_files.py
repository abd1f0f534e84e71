"""Damaged sidecars, logs, records, checkpoints and configurations: one line that names the file, or taken as absent."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.errors import DiffDiscoverError
from diffdiscover3d.evaluation.brats import _check_split
from diffdiscover3d.hub import embedded_models
from diffdiscover3d.hub.registry import load_teacher
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.reporting.index_page import write_index
from diffdiscover3d.reporting.label_maps import read_sidecar
from diffdiscover3d.reporting.plots import save_loss_curves
from diffdiscover3d.segmentation.outputs import Extras, is_finished, plan_case
from diffdiscover3d.training.checkpoints import load_checkpoint, save_checkpoint
from diffdiscover3d.training.config import DiffusionConfig
from diffdiscover3d.training.options import read_options
from diffdiscover3d.training.recipes import final_loss
from diffdiscover3d.training.resume import check_output
from diffdiscover3d.utils.checksums import verify_checksums
from diffdiscover3d.utils.files import read_log, read_record
from diffdiscover3d.utils.staging import recover_folder
from diffdiscover3d.workflows.discover_plan import read_plan

KEYS = (
    "step files model arguments input outputs parts sha256 test grid scans settings _class_name num_parts unet loss "
    "names median batch_size"
)
DAMAGE = {
    "empty": b"",
    "torn": b'{"step": 3, "files": {"mod',
    "binary": bytes(range(256)) * 4,
    "another type": b"[1, 2, 3]",
    "values of other types": json.dumps({key: {"a": [None]} for key in KEYS.split()}).encode(),
    "nested": b'{"parent":' * 50_000 + b"1" + b"}" * 50_000,
    "a named pipe": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an intact file of every kind."""
    folder, model = tmp_path_factory.mktemp("whole"), embedded_models()["synthetic-regular"]
    shutil.copytree(model.folder, folder / "model")
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.uint8), np.eye(4)), folder / "s_dseg.nii.gz")
    (folder / "s_dseg.json").write_text(json.dumps({"diffdiscover3d": "0", "model": {}, "parts": [{"fraction": 1}]}))
    (folder / "s_report.html").write_text("")
    (folder / "s_dseg.tsv").write_text("")
    tensors = {"model": {"w": torch.ones(2)}, "optimizer": {"0.step": torch.ones(1)}}
    save_checkpoint(folder, 3, tensors, {"config": {}, "identity": {}})
    for name in ("train_config.json", "log.jsonl", "split.json", "plan.json", "row.json", "options.json"):
        (folder / name).write_text("{}")
    (folder / ".diffdiscover3d.dead" / "new").mkdir(parents=True)
    for name in ("owner", "journal.json", "undo.json"):
        (folder / ".diffdiscover3d.dead" / name).write_text("")
    return folder


def index(folder):
    write_index(folder / "index.html", [folder / "s_report.html"])
    return "parts: " in (folder / "index.html").read_text()


def finished(folder):
    case = plan_case(folder / "s.nii.gz", None, (None,), Extras())
    return is_finished(case, {None: {"model": {}, "arguments": {}}}, "0" * 64)


def training_in(folder):
    return DiffusionConfig(dataset="x", output_dir=str(folder), resume="latest")


def curves(folder):
    """The picture of the losses is a wish: a log without rows leaves none."""
    save_loss_curves(folder / "losses.png", folder / "log.jsonl")


def recovered(folder):
    recover_folder(folder)
    return (folder / ".diffdiscover3d.dead").exists()


# the file, what reads it, and what it returns if it takes a damaged file as absent; else it raises an error
READERS = {
    "sidecar, report": ("s_dseg.json", lambda f: read_sidecar(f / "s_dseg.nii.gz"), {}),
    "sidecar, index": ("s_dseg.json", index, False),
    "sidecar, resume": ("s_dseg.json", finished, False),
    "state of a checkpoint": ("checkpoint-00000003/state.json", lambda f: load_checkpoint(f / "checkpoint-00000003"),),
    "weights of a checkpoint": (
        "checkpoint-00000003/model.safetensors", lambda f: load_checkpoint(f / "checkpoint-00000003"),
    ),
    "options of a training": ("train_config.json", lambda f: check_output(training_in(f))),
    "option file": ("options.json", lambda f: read_options(DiffusionConfig, f / "options.json")),
    "log, resume": ("log.jsonl", lambda f: read_log(f / "log.jsonl"), []),
    "log, picture": ("log.jsonl", curves, None),
    "log, start": ("log.jsonl", final_loss),
    "split": ("split.json", lambda f: _check_split(f, "test", ["a"])),
    "plan": ("plan.json", lambda f: read_plan(f / "plan.json")),
    "row of a table": ("row.json", lambda f: read_record(f / "row.json", "settings", "dice")),
    "config": ("model/discovery/config.json", lambda f: resolve_model(str(f / "model"))),
    "checksums": ("model/discovery/checksums.json", lambda f: verify_checksums(f / "model" / "discovery"), None),
    "working grid": (
        "model/discovery/working_grid.json", lambda f: resolve_model(str(f / "model")).working_grid, None,
    ),
    "domain": ("model/discovery/domain.json", lambda f: resolve_model(str(f / "model")).config["num_parts"], 8),
    "pipeline": ("model/diffusion/model_index.json", lambda f: load_teacher(str(f / "model"))),
    "scheduler": ("model/diffusion/scheduler/scheduler_config.json", lambda f: load_teacher(str(f / "model"))),
    "journal": (".diffdiscover3d.dead/journal.json", recovered, False),
    "journal, undone": (".diffdiscover3d.dead/undo.json", recovered, False),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_answered(whole, tmp_path, reader, damage):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    name, read, *taken_as = READERS[reader]
    path = folder / name
    path.unlink(missing_ok=True)
    if DAMAGE[damage] is None:
        os.mkfifo(path)  # an answer that waits for a writer would hang the test
    else:
        path.write_bytes(DAMAGE[damage])
    try:
        found = read(folder)
    except (DiffDiscoverError, OSError) as error:  # an OSError names its file, and ends a command in one line
        text = str(error)
        assert str(path) in text or str(path.parent) in text or (str(folder) in text and path.name in text), text
        assert len(text.splitlines()) == 1
    else:
        assert taken_as, f"no error, but {found!r}"
        assert found == taken_as[0]


def test_the_intact_files_are_read(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    assert read_sidecar(folder / "s_dseg.nii.gz")["parts"] == [{"fraction": 1}] and index(folder)
    assert load_checkpoint(folder / "checkpoint-00000003")[1]["step"] == 3
    assert resolve_model(str(folder / "model")).domain["scans"] == 80 and not recovered(folder)
    verify_checksums(folder / "model" / "discovery")
    load_teacher(str(folder / "model"))
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st\n[1]\n{"step": "x"}\n{"step": 2, "loss": 3}\n')
    assert [row["loss"] for row in read_log(folder / "log.jsonl")] == [2.0, 3]
