"""Table 3: which rows there are, what is computed again, and what is refused."""

import json

import pytest

from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.evaluation import brats_table
from diffdiscover3d.evaluation.brats import score_brats
from diffdiscover3d.evaluation.brats_table import BraTSTable, fill_table3, table3_rows
from diffdiscover3d.evaluation.paper_tables import METHODS, Method
from tests.helpers.brats_folders import make_brats

OPTIONS = BraTSOptions(crop=(20, 22, 19))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return make_brats(tmp_path / "data", "2021", count=7)


def test_k_means_scores_as_if_run_directly(root, tmp_path):
    result = fill_table3(root, tmp_path / "out", ["k-means"], options=OPTIONS)
    volumes = BraTSVolumes(root, "test", OPTIONS)
    rows, cases = score_brats(METHODS["k-means"].baseline(3, None, 0).predict, volumes)
    assert [row["dice"] for row in result["rows"]] == [row["dice"] for row in rows]
    assert result["cases"]["k-means"] == json.loads(json.dumps(cases))
    assert "k-means" in (tmp_path / "out" / "table3.md").read_text()


def test_finished_rows_are_read_and_not_computed_again(root, tmp_path, monkeypatch):
    first = fill_table3(root, tmp_path / "out", ["k-means"], options=OPTIONS)
    monkeypatch.setattr(brats_table, "score_brats", lambda *_: pytest.fail("computed again"))
    assert fill_table3(root, tmp_path / "out", ["k-means"], options=OPTIONS)["rows"] == first["rows"]
    with pytest.raises(ModelError, match="other settings"):
        fill_table3(root, tmp_path / "out", ["k-means"], options=OPTIONS, seed=1)


def test_all_cases_are_for_rows_that_none_of_them_trained(root, tmp_path):
    table = BraTSTable(root, tmp_path / "out", OPTIONS, split="all")
    assert len(table.volumes) == 7 and table.settings_of("k-means")["cases"] == sorted(table.volumes.split_ids["all"])
    for name in ("ours", "features-k-means-2"):
        with pytest.raises(InputError, match="trained on the folder's training cases"):
            table.fill(name)


def test_a_baseline_without_its_weights_is_left_out_with_the_reason(root, tmp_path, monkeypatch):
    def make(num_parts, teacher, seed):
        raise ModelError("no weights here")

    monkeypatch.setitem(METHODS, "med3d", Method("Med3D", make, needs_teacher=False))
    monkeypatch.setattr(brats_table, "table3_rows", lambda: ("k-means", "med3d"))
    result = fill_table3(root, tmp_path / "out", options=OPTIONS)
    assert [row["method"] for row in result["rows"]] == ["k-means", "k-means"]
    assert result["left_out"] == {"med3d": "no weights here"}
    with pytest.raises(ModelError, match="no weights here"):
        fill_table3(root, tmp_path / "out", ["med3d"], options=OPTIONS)


def test_unknown_rows_are_named():
    assert set(table3_rows()) >= {"ours", "no-visual", "no-feature", "no-invariance", "k-means", "features-k-means-2"}


def test_an_unknown_row_is_refused(root, tmp_path):
    with pytest.raises(InputError, match="no such row"):
        fill_table3(root, tmp_path / "out", ["nothing"], options=OPTIONS)
