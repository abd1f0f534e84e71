"""A finished training resumed with more steps equals one that was started with all of them."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from diffdiscover3d.errors import ModelError
from diffdiscover3d.train import run
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.schedules import settle_epochs
from tests.helpers.training_runs import DIFFUSION, DISCOVERY, hashes, write_scans


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "scans")


@pytest.fixture(scope="module")
def teacher(scans, tmp_path_factory):
    return run(diffusion(scans, tmp_path_factory.mktemp("teacher"), max_steps=1))


def plain(options):
    return {name.replace("-", "_"): value for name, value in options.items()}


def diffusion(scans, output, **options):
    own = {"dataset": str(scans), "output_dir": str(output), "preview_every": 0, "lr_schedule": "constant"}
    return make_config(DiffusionConfig, **{**plain(DIFFUSION), **own, **options})


def discovery(scans, teacher, output, **options):
    own = {"dataset": str(scans), "output_dir": str(output), "preview_every": 0, "lr_schedule": "constant"}
    own |= {"teacher": str(teacher), "dropout": 0.1}
    return make_config(DiscoveryConfig, **{**plain(DISCOVERY), **own, **options})


def final_weights(folder):
    return load_file(
        next(p for p in folder.rglob("diffusion_pytorch_model.safetensors") if "checkpoints" not in str(p))
    )


def assert_equal_models(one, two):
    a, b = final_weights(one), final_weights(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_extended_diffusion_training_equals_an_uninterrupted_one(scans, tmp_path):
    schedule = {"lr_schedule": "constant_with_warmup", "lr_warmup_steps": 4, "adam_weight_decay": 0.01}
    run(diffusion(scans, tmp_path / "whole", max_steps=5, **schedule))
    run(diffusion(scans, tmp_path / "part", max_steps=2, **schedule))
    assert hashes(tmp_path / "part")["step"] == 2
    run(diffusion(scans, tmp_path / "part", max_steps=5, resume="latest", **schedule))
    assert hashes(tmp_path / "part") == hashes(tmp_path / "whole")
    assert_equal_models(tmp_path / "part", tmp_path / "whole")
    assert json.loads((tmp_path / "part" / "train_config.json").read_text())["max_steps"] == 5
    # an epoch of 6 scans in batches of 4 has 2 steps; resuming by epochs extends as well
    run(diffusion(scans, tmp_path / "part", num_train_epochs=3, resume="latest", **schedule))
    assert hashes(tmp_path / "part")["step"] == 6


@pytest.mark.parametrize("selection", ["confidence", "last"])
def test_an_extended_discovery_selects_as_an_uninterrupted_one(scans, teacher, tmp_path, selection, monkeypatch):
    """Epochs have 2 steps: the shorter training ends within an epoch, and selects this last step."""
    after_step, confidences = DiscoveryTraining.after_step, {2: 0.5, 3: 0.9, 4: 0.6, 6: 0.55}

    def scripted(self, step):
        self.mean_confidence = lambda: confidences[step]
        return after_step(self, step)

    monkeypatch.setattr(DiscoveryTraining, "after_step", scripted)
    options = {"selection": selection, "learning_rate": 1e-2}
    run(discovery(scans, teacher, tmp_path / "whole", max_steps=6, **options))
    run(discovery(scans, teacher, tmp_path / "part", max_steps=3, **options))
    assert json.loads((tmp_path / "part" / "selection.json").read_text())["kept_step"] == 3
    run(discovery(scans, teacher, tmp_path / "part", max_steps=6, resume="latest", **options))
    assert hashes(tmp_path / "part") == hashes(tmp_path / "whole")
    for name in ("selection.json", "config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept = json.loads((tmp_path / "part" / "selection.json").read_text())["kept_step"]
    assert kept == (4 if selection == "confidence" else 6)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_a_schedule_with_a_set_end_is_not_extended(scans, tmp_path, schedule):
    run(diffusion(scans, tmp_path, max_steps=1, lr_schedule=schedule))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    message = (
        "training of 1 steps, which cannot be extended to 3: the learning rates of the schedule "
        f"{schedule} depend on the number of steps; use --max-steps 1 .* or start one of 3 steps in another --output"
    )
    with pytest.raises(ModelError, match=message):
        run(diffusion(scans, tmp_path, max_steps=3, lr_schedule=schedule, resume="latest"))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_other_options_and_fewer_steps_are_refused(scans, tmp_path):
    run(diffusion(scans, tmp_path, max_steps=2))
    with pytest.raises(ModelError, match=re.escape("(max_steps was 2 and is 1)")):
        run(diffusion(scans, tmp_path, max_steps=1, resume="latest"))
    with pytest.raises(ModelError, match="max_steps was 2 and is 4, seed was 0 and is 1"):
        run(diffusion(scans, tmp_path, max_steps=4, seed=1, resume="latest"))
    # an option that was not recorded because it had its default
    with pytest.raises(ModelError, match="prediction_type was 'sample' and is 'epsilon'"):
        run(diffusion(scans, tmp_path, max_steps=2, prediction_type="epsilon", resume="latest"))


def test_epochs_are_steps_of_full_batches():
    config = make_config(DiffusionConfig, num_train_epochs=3, batch_size=4)
    for volumes, steps in ((6, 6), (8, 6), (9, 9), (1, 3)):
        settled = settle_epochs(config, volumes)
        assert (settled.max_steps, settled.num_train_epochs) == (steps, None)
    # as in diffusers, a number of steps takes precedence; so do options over the presets
    assert make_config(DiffusionConfig, num_train_epochs=3, max_steps=7).num_train_epochs is None
    assert settle_epochs(make_config(DiffusionConfig, preset="small", num_train_epochs=2), 80).max_steps == 40
