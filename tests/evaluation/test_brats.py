"""Evaluation on BraTS, and the complete recipe on small folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError
from diffdiscover3d.evaluation.brats import evaluate_brats, format_brats_rows, score_brats
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.utils.provenance import weights_sha256
from tests.helpers.brats_folders import LAYOUTS, SHAPE, make_brats, save

ROOT = Path(__file__).parents[2]
CROP = (20, 22, 19)
OPTIONS = BraTSOptions(crop=CROP)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))


def oracle(volumes, order):
    """A method that returns the reference parts with permuted labels."""
    answers = iter([volumes.crop(volumes.true_parts(i)) for i in range(len(volumes))])
    return lambda _: np.asarray(order)[next(answers)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_perfect_method(tmp_path, order):
    volumes = BraTSVolumes(make_brats(tmp_path / "data", "2021"), "train", OPTIONS)
    rows, cases = score_brats(oracle(volumes, order), volumes)
    assert rows[0]["dice"] == rows[0]["dice_one_matching"] == 1 and rows[0]["hd95_mm"] == 0
    assert [case["part"] for case in cases] == [order[2]] * 4
    assert [row["postprocessed"] for row in rows] == [False, True] and rows[1]["dice"] > 0.9


def test_a_constant_shift_is_measured_in_mm(tmp_path):
    volumes = BraTSVolumes(make_brats(tmp_path / "data", "2021"), "train", BraTSOptions(crop=None))
    answers = iter([np.roll(volumes.true_parts(i), 2, axis=1) for i in range(4)])
    rows, _ = score_brats(lambda _: next(answers), volumes)
    assert rows[0]["hd95_mm"] == pytest.approx(2, abs=0.3) and 0.5 < rows[0]["dice"] < 0.95


def test_misses_are_counted_and_cost_the_diagonal(tmp_path):
    volumes = BraTSVolumes(make_brats(tmp_path / "data", "2021"), "train", OPTIONS)
    save(volumes.cases[0].mask, np.zeros(SHAPE, np.uint8))  # a case without tumour
    rows, cases = score_brats(oracle(volumes, (0, 1, 2)), volumes)
    # the predicted mask is empty too
    assert cases[0]["raw"] == {"dice": 1.0, "hd95_mm": 0.0, "empty": False} and rows[0]["empty"] == 0
    rows, _ = score_brats(lambda v: np.zeros(v.shape[1:], np.uint8), volumes)
    diagonal = float(np.linalg.norm(SHAPE))
    assert rows[0]["empty"] == 3 and rows[0]["hd95_mm"] == pytest.approx(diagonal * 3 / 4)
    assert rows[0]["dice"] == 0.25 and all(np.isfinite(v) for v in rows[0].values())


def test_tumour_beyond_the_crop_counts_as_missed(tmp_path):
    root = make_brats(tmp_path / "data", "2021")
    volumes = BraTSVolumes(root, "test", OPTIONS)
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:15, 10:15, 8:12] = 1
    mask[0:3, 10:15, 8:12] = 4  # the crop begins at 3
    save(volumes.cases[0].mask, mask)
    rows, _ = score_brats(oracle(volumes, (0, 1, 2)), volumes)
    assert rows[0]["dice"] == pytest.approx(2 * 100 / (100 + 160))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluate_writes_what_it_used(tmp_path, layout, tiny_discovery):
    root = make_brats(tmp_path / "data", layout)
    grade = BraTSOptions(crop=CROP, grade="all")
    nothing = {"zeros": lambda v: np.zeros(v.shape[1:], np.uint8)}
    teacher = "synthetic-regular" if layout == "MSD" else None
    result = evaluate_brats(root, {"ours": str(tiny_discovery)}, options=grade, teacher=teacher, more=nothing)
    methods = ["ours", "k-means", *(["features k-means, stage 2"] if teacher else []), "zeros"]
    assert [row["method"] for row in result["rows"][::2]] == [row["method"] for row in result["rows"][1::2]] == methods
    assert result["weights_sha256"]["ours"]["diffusion_pytorch_model.safetensors"]
    assert sum(map(len, result["split_ids"].values())) == 6
    assert [c["id"] for c in result["cases"]["k-means"]] == result["split_ids"]["test"]
    assert str(tmp_path) not in json.dumps(result)
    kmeans = next(row for row in result["rows"] if row["method"] == "k-means")
    assert kmeans["dice"] > 0.5, "the tumour is the brightest part of these volumes"
    table = format_brats_rows(result["rows"])
    assert "| k-means | yes |" in table and len({line.count("|") for line in table.splitlines()}) == 1


def test_the_split_is_that_of_the_models_training(tmp_path, tiny_discovery):
    """A model trained on high grades alone, scored with all, would meet cases of its training."""
    root = make_brats(tmp_path / "data", "2019", count=12)
    model = shutil.copytree(tiny_discovery, tmp_path / "model")
    trained = BraTSVolumes(root, "train", OPTIONS).split_ids
    (model / "split.json").write_text(json.dumps(trained))
    assert evaluate_brats(root, {"ours": str(model)}, options=OPTIONS, kmeans=False)["split_ids"] == trained
    other = BraTSOptions(crop=CROP, grade="all")
    wrong = BraTSVolumes(root, "train", other).split_ids["test"]
    seen = sorted(set(wrong) - set(trained["test"]))
    with pytest.raises(InputError, match=r"split\.json: the test cases differ from those .*--grade") as caught:
        evaluate_brats(root, {"ours": str(model)}, options=other, kmeans=False)
    assert f"{len(seen)} more ({', '.join(seen[:3])})" in str(caught.value)
    shutil.rmtree(BraTSVolumes(root, "test", OPTIONS).cases[0].mask.parent)
    with pytest.raises(InputError, match="missing"):
        evaluate_brats(root, {"ours": str(model)}, options=OPTIONS, kmeans=False)


def test_embedded_models_are_recorded_by_their_weights(tmp_path):
    root = make_brats(tmp_path / "data", "2021")
    result = evaluate_brats(root, {"cells": "synthetic-regular"}, options=OPTIONS, kmeans=False)
    assert result["weights_sha256"]["cells"] == weights_sha256(resolve_model("synthetic-regular").folder)


def test_missing_masks_stop_it_before_the_work(tmp_path):
    root = make_brats(tmp_path / "data", "2021")
    for path in root.rglob("*seg*"):
        path.unlink()
    with pytest.raises(InputError, match="no mask"):
        evaluate_brats(root, {}, options=OPTIONS, more={"never": lambda _: pytest.fail("called")})


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_table(tmp_path, layout):
    """Both trainings, three ablations and the table, by the one documented command, in a few steps each."""
    root = make_brats(tmp_path / "data", layout, count=7)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    steps = {"max_steps": 2, "batch_size": 2, "preview_every": 0}
    (tmp_path / "diffusion.json").write_text(json.dumps({**steps, "width": 8, "sample_size": 16}))
    (tmp_path / "discovery.json").write_text(json.dumps(steps))
    command = ["bash", str(ROOT / "examples" / "brats_table3.sh"), str(root), str(tmp_path / "out")]
    command += ["--crop", "20", "22", "19", "--grade", "all", "--device", "cpu"]
    command += ["--diffusion-options", str(tmp_path / "diffusion.json")]
    command += ["--discovery-options", str(tmp_path / "discovery.json")]
    rows = ("ours", "no-invariance", "no-feature", "no-visual", "k-means", "features-k-means-2")
    command += [word for name in rows for word in ("--method", name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "table3.json").read_text())
    titles = ["ours", "ours, λinv = 0", "ours, λf = 0", "ours, λv = 0", "k-means", "features k-means, stage 2"]
    assert [row["method"] for row in result["rows"][::2]] == titles
    models = tmp_path / "out" / "models"
    for name in ("diffusion", "ours", "no-invariance", "no-feature", "no-visual"):
        assert json.loads((models / name / "split.json").read_text()) == result["split_ids"]
    config = json.loads((models / "no-visual" / "train_config.json").read_text())
    assert config["lambda_visual"] == 0 and config["lambda_feature"] == 1 and config["num_parts"] == 3
    assert torch.tensor([row["hd95_mm"] for row in result["rows"]]).isfinite().all()
