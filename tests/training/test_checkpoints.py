"""Checkpoints: atomic writes, no pickle, detection of damage."""

import json

import pytest
import torch

from diffdiscover3d.errors import ModelError
from diffdiscover3d.training.checkpoints import (
    find_checkpoint,
    later_checkpoints,
    list_checkpoints,
    load_checkpoint,
    pack_optimizer,
    prune_checkpoints,
    remove_partial,
    save_checkpoint,
    unpack_optimizer,
)


def save(folder, step):
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}
    return save_checkpoint(folder, step, tensors, {"note": "x"})


def test_round_trip(tmp_path):
    path = save(tmp_path, 5)
    tensors, state = load_checkpoint(path)
    assert torch.equal(tensors["model"]["w"], torch.full((3,), 5.0)) and state["step"] == 5 and state["note"] == "x"
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000005"]  # no temporary left


def test_latest_whole_one_is_found(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    with open(tmp_path / "checkpoint-00000015" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    (tmp_path / "checkpoint-00000010" / "state.json").write_text('{"step": 10, "fil')
    warnings = []
    _tensors, state = find_checkpoint(tmp_path, "latest", warnings.append)
    assert state["step"] == 5 and len(warnings) == 2 and "checkpoint-00000015" in warnings[0]
    with pytest.raises(ModelError, match="sha256"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-00000015"), warnings.append)


def test_nothing_to_resume_and_nothing_whole(tmp_path):
    assert find_checkpoint(tmp_path / "absent", "latest", print) is None
    save(tmp_path, 1)
    (tmp_path / "checkpoint-00000001" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="every checkpoint is damaged"):
        find_checkpoint(tmp_path, "latest", lambda _: None)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffdiscover3d.training.checkpoints.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_folders_of_killed_writers_are_removed_without_locks(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / ".diffdiscover3d-file.left"
    (left / "new").mkdir(parents=True)
    (left / "new" / "model.safetensors").touch()
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 20, 3):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000003", "checkpoint-00000020"]


def test_later_and_torn_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoint-00000003" / "model.safetensors").write_bytes(b"torn")
    whole, damaged = later_checkpoints(tmp_path, 1)
    assert [p.name[-1] for p in whole] == ["2", "4"] and [p.name[-1] for p in damaged] == ["3"]
    assert later_checkpoints(tmp_path, 4) == ([], [])


DAMAGE = {
    "another step": lambda state: {**state, "step": 4},
    "a step that is no number": lambda state: {**state, "step": "5"},
    "no step": lambda state: {k: v for k, v in state.items() if k != "step"},
    "no model": lambda state: {**state, "files": {k: v for k, v in state["files"].items() if "model" not in k}},
    "no optimizer": lambda state: {**state, "files": {k: v for k, v in state["files"].items() if "optim" not in k}},
    "no files": lambda state: {**state, "files": {}},
    "files that are a list": lambda state: {**state, "files": list(state["files"])},
    "options that are none": lambda state: {**state, "config": "seed"},
    "a list": lambda state: [state],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_cannot_be_is_damage(tmp_path, damage):
    save(tmp_path, 3)
    path = save(tmp_path, 5)
    load_checkpoint(path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(DAMAGE[damage](state)))
    with pytest.raises(ModelError, match="checkpoint-00000005: not a complete checkpoint"):
        load_checkpoint(path)
    lines = []
    assert find_checkpoint(tmp_path, "latest", lines.append)[1]["step"] == 3
    assert len(lines) == 1 and "skipping checkpoint-00000005" in lines[0]


def test_optimizer_goes_on_as_if_uninterrupted():
    def run(steps, state=None):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(4, 3))
        optimizer = torch.optim.Adam([w], lr=0.1)
        if state:
            w.data.copy_(state["w"])
            unpack_optimizer(optimizer, state["optimizer"])
        for _ in range(steps):
            optimizer.zero_grad()
            (w**2).sum().backward()
            optimizer.step()
        return {"w": w.detach().clone(), "optimizer": pack_optimizer(optimizer)}

    assert torch.equal(run(7)["w"], run(3, run(4))["w"])
    packed = run(2)["optimizer"]
    assert json.dumps(sorted(packed)) == '["0.exp_avg", "0.exp_avg_sq", "0.step"]'
