"""Rows of tables 1 and 3 that are trained baselines: labels as allowed, resumed, published figures beside them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from diffdiscover3d.baselines.jiang import Jiang
from diffdiscover3d.baselines.med3d import Med3DDiscovery, Med3DFeatures
from diffdiscover3d.baselines.nalepa import Nalepa
from diffdiscover3d.cli import app
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.evaluation import brats_table as brats_module
from diffdiscover3d.evaluation import paper_tables as module
from diffdiscover3d.evaluation.brats_table import BASELINES, TRAINED, BraTSTable, fill_table3
from diffdiscover3d.evaluation.memory_use import PeakMemory
from diffdiscover3d.evaluation.methods import METHODS, make_baseline
from diffdiscover3d.evaluation.paper_tables import TABLES, Cell, PaperTable, benchmark
from diffdiscover3d.evaluation.published import PUBLISHED_BRATS, PUBLISHED_DICE
from diffdiscover3d.reporting.score_tables import format_table
from tests.baselines.toys import TINY
from tests.helpers.brats_folders import make_brats

OPTIONS = BraTSOptions(crop=(20, 22, 19))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Baselines that train for a moment, on two volumes of each split."""
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffdiscover3d.data.datasets.synthetic.SPLITS", {"train": 2, "validation": 2, "test": 2})
    for method, _, settings in TINY.values():
        small = dataclasses.replace(method.presets["small"], **settings)
        monkeypatch.setattr(method, "presets", {**method.presets, "small": small})
    small = dataclasses.replace(Med3DDiscovery.presets["small"], steps=1)
    monkeypatch.setattr(Med3DDiscovery, "presets", {"small": small})


@pytest.fixture(scope="module")
def med3d(tmp_path_factory) -> str:
    """A file of made-up weights in MedicalNet's layout."""
    file = tmp_path_factory.mktemp("med3d") / "resnet_50.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in Med3DFeatures().network.state_dict().items()}}, file)
    return str(file)


@pytest.mark.parametrize(
    ("name", "amount"), [("nalepa", "none"), ("cicek", "slice"), ("zhao", "volume"), ("jiang", "all")]
)
def test_each_method_gets_the_labels_it_is_allowed(tiny, tmp_path, monkeypatch, name, amount):
    method, seen = TINY[name][0], []
    original = method.fit

    def fit(self, volumes, folder=None):
        seen.append([int((volumes[i]["labels"] >= 0).sum()) if "labels" in volumes[i] else None for i in range(2)])
        original(self, volumes, folder)

    monkeypatch.setattr(method, "fit", fit)
    row = PaperTable(tmp_path).fill(Cell("regular", name, 2, 0))
    given = {"none": [None, None], "slice": [2500, 2500], "volume": [0, 125_000], "all": [125_000] * 2}[amount]
    assert sorted(seen[0], key=str) == sorted(given, key=str)
    assert row["labels"] == amount and row["kind"] == METHODS[name].kind
    assert row["training_seconds"] > 0 and row["peak_memory_mib"] > 100 and 0 < row["dice"] < 1
    assert row["published"] == PUBLISHED_DICE.get(("regular", METHODS[name].title), (None,) * 3)[1]
    # a second run reads it, and training is not repeated for another run of the table either
    monkeypatch.setattr(method, "fit", None)
    assert PaperTable(tmp_path).fill(Cell("regular", name, 2, 0)) == row


def test_a_stopped_table_continues_and_gives_the_same_scores(tiny, tmp_path, monkeypatch):
    methods, where = ("nalepa",), {"variants": ("irregular",), "levels": (1, 2)}
    whole = benchmark(tmp_path / "whole", methods, **where)
    scores = [row["dice"] for row in whole["rows"]]

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, "score", stop)  # trained, not scored
        with pytest.raises(Stopped):
            benchmark(tmp_path / "part", methods, **where)
    assert not (tmp_path / "part" / "cells").exists()
    again = benchmark(tmp_path / "part", methods, **where)
    assert [row["dice"] for row in again["rows"]] == scores
    table = format_table(again["summary"])
    assert "| 0.527 / 0.280 | unsupervised | none |" in table and "| level 2 | published | kind |" in table


def test_rows_that_need_medicalnet_are_missing_without_it(tiny, tmp_path, med3d):
    found = benchmark(tmp_path / "a", ("k-means", "med3d-k-means", "med3d"), variants=("regular",), levels=(1,))
    assert found["missing"] == ["med3d-k-means", "med3d"] and len(found["rows"]) == 1
    methods = ("med3d-k-means", "med3d")
    found = benchmark(tmp_path / "b", methods, variants=("regular",), levels=(1,), med3d=med3d)
    assert found["missing"] == [] and [row["method"] for row in found["rows"]] == list(methods)
    with pytest.raises(InputError, match="needs MedicalNet's weights"):
        make_baseline(METHODS["med3d"], 2, 0)


def test_table_3(tiny, tmp_path, med3d, monkeypatch):
    root = make_brats(tmp_path / "data", "2021", count=7)
    methods = ("k-means", "aucseg", "nalepa", "jiang", "med3d-k-means")
    arguments = {"methods": methods, "options": OPTIONS, "med3d": med3d, "recipe": "small"}
    found = fill_table3(root, tmp_path / "out", **arguments)
    rows = {row["method"]: row for row in found["rows"] if not row["postprocessed"]}
    assert rows["AUCseg"]["dice"] > 0.8 and rows["Jiang et al."]["labels"] == "all"
    assert tuple(rows["Nalepa et al."]["published"]) == PUBLISHED_BRATS["Nalepa et al."]
    assert rows["Nalepa et al."]["training_seconds"] > 0 and rows["k-means"]["training_seconds"] == 0
    text = (tmp_path / "out" / "table3.md").read_text()
    assert "| 0.211 | 170.434 | unsupervised | none |" in text and "| 0.82 |  | no training |" in text
    # read again, not computed
    monkeypatch.setattr(brats_module, "score_brats", None)
    again = fill_table3(root, tmp_path / "out", **arguments)
    assert json.dumps(again["rows"]) == json.dumps(found["rows"])
    with pytest.raises(ModelError, match="other settings"):
        fill_table3(root, tmp_path / "out", **{**arguments, "methods": ("nalepa",), "recipe": "paper"})


def test_only_the_training_cases_train(tiny, tmp_path, monkeypatch):
    root = make_brats(tmp_path / "data", "2021", count=7)
    seen = []
    monkeypatch.setattr(Jiang, "fit", lambda self, volumes, folder=None: seen.extend(v["name"] for v in volumes))
    monkeypatch.setattr(Jiang, "predict", lambda self, volume: np.zeros(volume.shape[1:], np.uint8))
    table = BraTSTable(root, tmp_path / "out", OPTIONS, recipe="small")
    row = table.fill("jiang")
    assert sorted(seen) == sorted(BraTSVolumes(root, "train", OPTIONS).split_ids["train"])
    assert not set(seen) & {case["id"] for case in row["cases"]}
    with pytest.raises(InputError, match="trained on the folder's training cases"):
        BraTSTable(root, tmp_path / "out", OPTIONS, split="all", recipe="small").fill("jiang")


def test_med3d_is_left_out_without_weights(tiny, tmp_path, monkeypatch):
    root = make_brats(tmp_path / "data", "2021", count=7)
    monkeypatch.setattr(brats_module, "table3_rows", lambda: ("k-means", "med3d", "med3d-k-means"))
    found = fill_table3(root, tmp_path / "out", options=OPTIONS, recipe="small")
    assert set(found["left_out"]) == {"med3d", "med3d-k-means"} and len(found["rows"]) == 2


def test_the_command_makes_table_3(tiny, tmp_path, capsys, monkeypatch):
    root = make_brats(tmp_path / "data", "2021", count=7)

    def run(*more: str) -> int:
        command = ["benchmark", "--table", "3", "-o", str(tmp_path / "out"), "--method", "k-means", *more]
        monkeypatch.setattr("sys.argv", ["diffdiscover3d", *command, "--crop", "20", "22", "19"])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return ended.value.code or 0

    assert run(str(root)) == 0
    assert "| k-means | yes |" in capsys.readouterr().out
    assert run() != 0 and "table 3 needs the FOLDER" in capsys.readouterr().err


def test_every_published_figure_has_its_row():
    titles = {METHODS[name].published for names in TABLES.values() for name in names}
    assert {name for _, name in PUBLISHED_DICE} <= titles
    assert len(PUBLISHED_DICE) == 21
    titles = {method.title for method in METHODS.values()} | {row.title for row in TRAINED.values()}
    assert set(PUBLISHED_BRATS) <= titles
    assert set(BASELINES) <= set(METHODS)
    for name in ("nalepa", "iic", "jule", "hsu", "k-means", "bm4d-k-means"):
        assert METHODS[name].labels == "none" and name in TABLES[1]
    assert {METHODS[name].labels for name in ("cicek", "zhao", "jiang")} == {"slice", "volume", "all"}


def test_peak_memory_sees_what_is_taken_and_given_back():
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        taken = np.ones(40_000_000)  # 305 MiB
        memory._look()
        del taken
    assert memory.peak_mib > before.peak_mib + 250


def test_jiang_and_nalepa_have_published_presets():
    assert Jiang.presets["paper"].widths == (16, 32) and Nalepa.presets["paper"].features == 25
