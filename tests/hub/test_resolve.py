"""A discovery network looked up once: folder, levels, configuration, weights."""

import hashlib
import json

import pytest
import torch

from diffdiscover3d.data.working_grid import WorkingGrid
from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub import resolve as module
from diffdiscover3d.hub.registry import embedded_models, load_discovery
from diffdiscover3d.hub.resolve import choose_levels, resolve_model

NETWORK = {"window_size": 256, "channels": [8, 16], "num_parts": 4}


def test_levels_of_a_nested_network(tmp_path):
    config = {**NETWORK, "num_parts": 8, "parent": {**NETWORK, "num_parts": 4, "parent": {**NETWORK, "num_parts": 2}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = resolve_model(str(tmp_path))
    assert [model.level_config(level)["num_parts"] for level in (None, 1, 2, 3)] == [8, 2, 4, 8]
    assert model.levels == (1, 2, 3) and model.config == config and model.commit is None
    assert model.choose_levels("all") == (1, 2, 3) and model.choose_levels(None) == (2,)
    with pytest.raises(ModelError, match=r"has the levels \[1, 2, 3\], not 4"):
        model.choose_levels(4)


def test_choice_of_levels():
    assert choose_levels("x", (), None) == choose_levels("x", (), "all") == (None,) and choose_levels("x", (), 3) == (
        3,
    )
    assert choose_levels("x", (1,), None) == (1,) and choose_levels("x", (1, 2, 3), None) == (2,)


def test_configurations_that_are_none(tmp_path):
    for text in ("{}", '{"num_parts": 2}'):
        (tmp_path / "config.json").write_text(text)
        assert resolve_model(str(tmp_path)).level_config() is None
    for text, word in (("", "configuration"), ("[]", "object"), ("null", "object"), ('{"parent": 3}', "`parent`")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=word):
            resolve_model(str(tmp_path))
    for name in (str(tmp_path / "absent"), "/no/model", "name"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(name)
    with pytest.raises(ModelError, match="no revisions"):
        resolve_model(str(tmp_path), "main")


@pytest.mark.parametrize(
    ("text", "grid"),
    [('{"grid": [18, 16, 15]}', (18, 16, 15)), ('{"grid": null}', None), ("", 0), ('{"grid": [1]}', 0)],
)
def test_working_grid(tmp_path, text, grid):
    (tmp_path / "config.json").write_text(json.dumps(NETWORK))
    (tmp_path / "working_grid.json").write_text(text)
    if grid == 0:
        with pytest.raises(ModelError, match=r"working_grid\.json: not readable.*remove it"):
            resolve_model(str(tmp_path))
    else:
        assert resolve_model(str(tmp_path)).working_grid == (grid and WorkingGrid(shape=grid))


def test_an_embedded_model_is_described_by_its_weights():
    (name, embedded), *_ = embedded_models().items()
    model = resolve_model(name)
    (weights,) = embedded.discovery.glob("*.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert model.describe(1) == {"id": name, "level": 1, "revision": None, "sha256": {weights.name: digest}}
    assert model.levels == embedded.levels


def test_the_levels_of_one_hierarchy_are_loaded_together():
    networks = resolve_model("synthetic-regular").load((1, 2), torch.device("cpu"))
    assert networks[2].parent_model is networks[1] and not networks[1].training
    for level, network in networks.items():
        for mine, theirs in zip(
            network.parameters(), load_discovery("synthetic-regular", level).parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_a_hub_model_is_recorded_with_its_commit(tmp_path, monkeypatch):
    commit = tmp_path / ("0123456789" * 4)
    commit.mkdir()
    (commit / "config.json").write_text(json.dumps(NETWORK))
    asked = []
    monkeypatch.setattr(module, "fetch_snapshot", lambda name, revision: (asked.append((name, revision)), commit)[1])
    model = resolve_model("user/name", "v1")
    assert asked == [("user/name", "v1")] and model.levels == ()
    assert model.describe(None) == {
        "id": "user/name",
        "level": None,
        "revision": "v1",
        "commit": commit.name,
        "sha256": {},
    }
