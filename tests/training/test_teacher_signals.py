"""Teacher outputs, computed at every step or once per volume."""

import pytest
import torch

from diffdiscover3d.data.transforms import flip
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.config import DiscoveryConfig, make_config
from diffdiscover3d.training.teacher_signals import TeacherSignals

GRID = (12, 8, 10)


def make(sample_size=8, nested=False, **options):
    torch.manual_seed(0)
    unet = UNet3DModel(
        width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4, sample_size=sample_size,
        resize_before_noise=sample_size is not None,
    )  # fmt: skip
    teacher = DiffusionFeaturePipeline(unet.eval(), make_scheduler(50))
    model = StructureDiscoveryModel(2).eval()
    if nested:
        model = StructureDiscoveryModel.from_parent(model, (1, 3)).eval()
    defaults = {"timestep": 10, "denoised_timesteps": (10, 20), "lambda_denoised": 1.0, "num_noise": 3}
    config = make_config(DiscoveryConfig, **{**defaults, **options})
    return TeacherSignals(config, teacher, model), teacher, model


def batch(volumes, indices, flips):
    flipped = torch.stack([flip(v, f) for v, f in zip(volumes, flips, strict=True)])
    return {"volume": flipped, "index": torch.tensor(indices), "flips": flips}


def test_fresh_signals_are_the_pipelines():
    signals, teacher, model = make(nested=True)
    volume = torch.rand(2, 1, *GRID)
    noise = torch.stack([signals.draw(teacher.unet.noise_grid, torch.Generator().manual_seed(i)) for i in range(2)])
    assert signals.timesteps == (10, 20) and noise.shape[1] == 6  # t = 10 serves features and clean prediction
    found = signals({"volume": volume, "noise": noise})
    by_draw = noise.movedim(1, 0)
    first = teacher.extract(volume, by_draw[:3], 10, (1,), denoised=True)
    second = teacher.extract(volume, by_draw[3:], 20, (), denoised=True)
    torch.testing.assert_close(found.features[0], first.features[0])
    torch.testing.assert_close(found.denoised, (first.denoised + second.denoised) / 2)
    assert torch.equal(found.parent_labels[:, 0], model.parent_model.segment(volume).labels.long())


def test_what_no_loss_needs_is_not_asked():
    signals, *_ = make(lambda_feature=0.0, denoised_timesteps=(20,))
    assert signals.timesteps == (20,)
    found = signals({"volume": torch.rand(1, 1, *GRID), "noise": signals.draw((8, 8, 8), torch.Generator())[None]})
    assert found.features == () and found.denoised.shape == (1, 1, *GRID) and found.parent_labels is None
    signals, *_ = make(lambda_denoised=0.0)
    assert signals.timesteps == (10,)
    signals, *_ = make(lambda_feature=0.0, lambda_denoised=0.0)  # the paper's ablation: the volume alone
    found = signals({"volume": torch.rand(1, 1, *GRID), "noise": signals.draw((8, 8, 8), torch.Generator())[None]})
    assert signals.timesteps == () and found.features == () and found.denoised is None


def test_fixed_signals_are_asked_once_and_mirrored(monkeypatch):
    signals, teacher, _ = make(teacher_noise="fixed", nested=True)
    volumes, plain = torch.rand(2, 1, *GRID), torch.zeros(2, 3, dtype=torch.bool)
    first = signals(batch(volumes, [5, 9], plain))
    monkeypatch.setattr(teacher, "extract", None)  # a second computation would fail
    flips = torch.tensor([[True, False, True], [False, True, False]])
    again = signals(batch(volumes, [5, 9], flips))
    for mine, theirs in ((again.features[0], first.features[0]), (again.denoised, first.denoised)):
        assert torch.equal(mine, torch.stack([flip(x, f) for x, f in zip(theirs, flips, strict=True)]))
    assert torch.equal(again.parent_labels[0], flip(first.parent_labels[0], flips[0]))
    assert again.features[0].dtype == torch.float32


def test_fixed_noise_depends_on_seed_and_volume_alone():
    volumes, plain = torch.rand(2, 1, *GRID), torch.zeros(2, 3, dtype=torch.bool)
    one, other, seeded = (make(teacher_noise="fixed", seed=seed)[0] for seed in (0, 0, 1))
    together = one(batch(volumes, [0, 1], plain)).denoised
    mirrored_first = other(batch(volumes, [0, 1], ~plain)).denoised  # the cache is equal
    torch.testing.assert_close(mirrored_first.flip(-1, -2, -3), together)
    assert not torch.equal(seeded(batch(volumes, [0, 1], plain)).denoised, together)
    assert not torch.equal(one(batch(volumes[:1], [2], plain[:1])).denoised, together[:1])


def test_padded_features_cannot_be_mirrored():
    signals, *_ = make(sample_size=None, teacher_noise="fixed")
    data = batch(torch.rand(1, 1, 11, 8, 10), [0], torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="--no-flips"):
        signals(data)
    signals, *_ = make(sample_size=None, teacher_noise="fixed", flips=False)
    assert signals(data).extent == (12, 8, 10)
