"""The training of `brain-flair` on phantoms in a few steps, and its scenes."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.data.datasets.brain_scans import BrainScans
from diffdiscover3d.hub.cards import training_command
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.training.brain import BrainTraining, SceneBank
from diffdiscover3d.training.brain_assignments import conspicuous_outliers
from diffdiscover3d.training.brain_config import BrainConfig
from diffdiscover3d.training.brain_run import train_brain
from diffdiscover3d.training.brain_scenes import SceneOptions, acquire_again, draw_scene
from diffdiscover3d.training.config import as_dict

FRAME = (32, 40, 36)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for index in (0, 3):
        volume = brain_phantom("test", index).volume[::2, ::2, ::2]
        nib.save(
            nib.Nifti1Image((volume * 200).astype(np.float32), np.diag([3.0, 3, 3, 1])), folder / f"{index}.nii.gz"
        )
    return folder


@pytest.fixture(scope="module")
def bank(scans):
    return SceneBank(BrainScans(scans, FRAME), 0.5, torch.device("cpu"))


def scene(bank, seed: int, options: SceneOptions | None = None, own: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    return draw_scene(bank.healthy, bank.brains.float(), bank.lesions.float() * own, generator, options)


def test_scenes_are_functions_of_their_seeds(bank):
    index, seeds = torch.tensor([0, 1]), torch.tensor([5, 6])
    a, b = bank.scenes(index, seeds), bank.scenes(index, seeds)
    assert torch.equal(a.view, b.view) and torch.equal(a.conspicuous, b.conspicuous)
    assert not torch.equal(a.view, bank.scenes(index, seeds + 1).view)


def test_views_are_scaled_brains_and_tissue_is_never_conspicuous(bank):
    quiet = SceneOptions(implants=(1.0, 0.0, 0.0, 0.0), spots=0.0)
    for seed in range(4):
        drawn = scene(bank, seed, quiet)
        assert torch.isfinite(drawn.view).all() and drawn.view.min() >= 0 and drawn.view.max() <= 1
        assert not drawn.view[~drawn.foreground].any() and drawn.foreground.float().mean() > 0.1
        assert drawn.conspicuous.max() <= 1.01
        assert not conspicuous_outliers(drawn.conspicuous, drawn.foreground).any()


def test_implants_are_brighter_than_the_tissue_around_them(bank):
    plain = SceneOptions(
        implants=(0.0, 1.0, 0.0, 0.0), spots=0.0, radius=(0.3, 0.4), contrast=(0.4, 0.5), core=0.0, cut=0.0, bias=0.0,
        noise=0.0, blur=0.0, slices=0.0,
    )  # fmt: skip
    brighter, sizes = [], []
    for seed in range(4):
        drawn = scene(bank, seed, plain)
        found = conspicuous_outliers(drawn.conspicuous, drawn.foreground)
        sizes.append(int(found.sum()))
        rest = drawn.foreground & ~found
        brighter += [
            v[f].mean() > v[r].mean() + 0.1 for v, f, r in zip(drawn.view, found, rest, strict=True) if f.sum() > 50
        ]
    assert sum(sizes) > 1000 and len(brighter) >= 3 and np.mean([bool(b) for b in brighter]) == 1


def test_a_scans_own_lesion_is_carried_along_with_it(bank):
    still = SceneOptions(implants=(1.0, 0.0, 0.0, 0.0), spots=0.0, cut=0.0)
    assert bank.lesions[0].sum() > 50  # phantom 0 has a large lesion
    drawn = scene(bank, 1, still, own=1.0)
    before, after = bank.lesions[0].float().mean(), drawn.carried[0].mean()
    assert 0.5 < float(after / before) < 2 and not scene(bank, 1, still).carried.any()


def test_another_acquisition_keeps_the_brain(bank):
    drawn = scene(bank, 2)
    again = acquire_again(drawn.view, drawn.foreground, torch.Generator().manual_seed(0))
    assert not torch.equal(again, drawn.view) and not again[~drawn.foreground].any()
    inside = drawn.foreground[0, 0]
    assert np.corrcoef(again[0, 0][inside], drawn.view[0, 0][inside])[0, 1] > 0.3


def options(scans, folder, **more) -> BrainConfig:
    defaults = {
        "preset": "tiny", "dataset": str(scans), "output_dir": str(folder), "frame": FRAME, "phantoms": 0,
        "max_steps": 4, "diffusion_steps": 2, "batch_size": 2, "reassign_every": 2, "checkpoint_every": 2,
        "preview_every": 0, "log_every": 3, "mixed_precision": "no", "memory_format": "contiguous",
        "save_dtype": "float16",
    }  # fmt: skip
    return BrainConfig(**(defaults | more))


def test_both_models_are_trained_and_resumed(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = train_brain(options(scans, tmp_path / "whole", lambda_invariance=0.1, lambda_visual=0.1))
    network = load_discovery(str(folder))
    assert [level.config.num_parts for level in network.levels] == [2, 3]
    assert network.config.scaling == "robust" and tuple(network.config.frame) == FRAME
    assert network.part_order.tolist() == [0, 1, 2] and network.parents == (0, 1, 1)
    assert load_teacher(str(folder)).unet.noise_grid == (16, 16, 16)
    log = [json.loads(line) for line in (folder / "discovery" / "log.jsonl").read_text().splitlines()]
    assert set(log[0]) >= {"loss", "level1", "entropy", "dice", "visual", "invariance"}
    assert any("agreement" in line for line in log)
    assert sum(p.stat().st_size for p in folder.rglob("diffusion_pytorch_model.safetensors")) < 2**21


def test_a_card_has_the_command_of_the_brain_training(scans, tmp_path):
    config = as_dict(options(scans, tmp_path, reassign_every=7))
    words = training_command("discovery", config).split()
    assert words[:5] == ["accelerate", "launch", "-m", "diffdiscover3d.train", "brain"]
    assert words[words.index("--reassign-every") + 1] == "7" and "--frame" in words


def test_a_training_that_was_stopped_ends_in_the_same_weights(scans, tmp_path, monkeypatch):
    """It is stopped after a reassignment, so that the scans' own lesions must come from the checkpoint."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    whole = options(scans, tmp_path / "whole", diffusion_steps=0, reassign_every=1)
    train_brain(whole)
    real = BrainTraining.losses

    def stop(task, model, batch):
        if len(stopped) == 2:
            raise KeyboardInterrupt
        stopped.append(True)
        return real(task, model, batch)

    stopped: list[bool] = []
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"))
    monkeypatch.setattr(BrainTraining, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        train_brain(parted)
    monkeypatch.setattr(BrainTraining, "losses", real)
    assert (tmp_path / "parted" / "discovery" / "checkpoints" / "checkpoint-00000002").is_dir()
    train_brain(dataclasses.replace(parted, resume="latest"))
    weights = [load_discovery(str(tmp_path / name)).state_dict() for name in ("whole", "parted")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_wrong_options_are_refused(scans, tmp_path):
    for name, value in (("frame", (96, 96)), ("real_share", 1.5), ("flips", True), ("phantoms", -1)):
        with pytest.raises(ValueError, match=name):
            options(scans, tmp_path, **{name: value})
