"""Targets, losses and min-SNR weights of the three prediction types, against closed formulas in float64."""

import json
import math

import pytest
import torch
from diffusers.training_utils import compute_snr

from diffdiscover3d.hub.registry import load_teacher
from diffdiscover3d.pipelines.schedulers import PREDICTION_TYPES
from diffdiscover3d.training import config
from diffdiscover3d.training.config import DiffusionConfig, make_config
from diffdiscover3d.training.diffusion import DiffusionTraining, make_unet, min_snr_weights

TYPES = ("sample", "epsilon", "v_prediction")
assert TYPES == PREDICTION_TYPES == config.PREDICTION_TYPES  # of pipelines and of trainings
STEPS = 50


def make_task(**options):
    options = {"preset": "small", "width": 8, "sample_size": 8, "num_train_timesteps": STEPS, **options}
    return DiffusionTraining(make_config(DiffusionConfig, **options), (8, 8, 8))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "volume": torch.rand(3, 1, 6, 5, 7, generator=generator),
        "noise": torch.randn(3, 1, 6, 5, 7, generator=generator),
        "timestep": torch.tensor([2, 25, 47]),
    }


def alpha_bar(timesteps):
    """The cosine schedule of Nichol and Dhariwal with betas of at most 0.999, in float64."""

    def f(t):
        return math.cos((t / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2

    product, values = 1.0, []
    for t in range(STEPS):
        product *= 1 - min(1 - f(t + 1) / f(t), 0.999)
        values.append(product)
    return torch.tensor([values[int(t)] for t in timesteps], dtype=torch.float64)


def targets(batch):
    """Clean volume, noise, velocity and noisy volume, and the signal-to-noise ratios."""
    a = alpha_bar(batch["timestep"]).view(-1, 1, 1, 1, 1)
    clean, noise = 2 * batch["volume"].double() - 1, batch["noise"].double()
    velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    return {"sample": clean, "epsilon": noise, "v_prediction": velocity}, noisy, (a / (1 - a)).flatten()


class Answer(torch.nn.Module):
    """Predicts what it is given, whatever the input; keeps the input."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, noisy, timestep):
        self.noisy = noisy
        return type("Output", (), {"sample": self.prediction})


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_losses_are_distances_to_the_right_target(batch, prediction_type, loss_type):
    task = make_task(prediction_type=prediction_type, loss_type=loss_type)
    prediction = torch.randn(batch["noise"].shape, generator=torch.Generator().manual_seed(1))
    model = Answer(prediction)
    loss = task.losses(model, batch)["loss"]
    expected, noisy, _ = targets(batch)
    difference = prediction.double() - expected[prediction_type]
    by_hand = difference.abs().mean() if loss_type == "l1" else (difference**2).mean()
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.noisy.double(), noisy, rtol=0, atol=5e-6)


@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_min_snr_weights_are_those_of_the_paper(batch, gamma):
    """And with them, the loss is the same whatever is predicted: min(SNR, gamma) times the clean volume's error."""
    *_, snr = targets(batch)
    torch.testing.assert_close(compute_snr(make_task().scheduler, batch["timestep"]).double(), snr, rtol=1e-3, atol=0)
    capped = snr.clamp(max=gamma)
    for kind, expected in (("sample", capped), ("epsilon", capped / snr), ("v_prediction", capped / (snr + 1))):
        torch.testing.assert_close(min_snr_weights(snr, gamma, kind), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_the_weighted_loss_is_the_same_whatever_is_predicted(batch, loss_type):
    """Predictions of one estimate of the clean volume, as noise or velocity, have the same min-SNR loss."""
    a = alpha_bar(batch["timestep"]).view(-1, 1, 1, 1, 1)
    true, noisy, snr = targets(batch)
    generator = torch.Generator().manual_seed(1)
    clean = true["sample"] + 0.1 * torch.randn(noisy.shape, generator=generator, dtype=torch.float64)
    noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
    estimates = {"sample": clean, "epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}
    error = (clean - true["sample"]).flatten(1)
    weights = snr.clamp(max=2.0)
    per_volume = weights.sqrt() * error.abs().mean(dim=1) if loss_type == "l1" else weights * (error**2).mean(dim=1)
    for prediction_type, estimate in estimates.items():
        task = make_task(prediction_type=prediction_type, loss_type=loss_type, snr_gamma=2.0)
        loss = task.losses(Answer(estimate.float()), batch)["loss"]
        torch.testing.assert_close(loss.double(), per_volume.mean(), rtol=2e-3, atol=0)


def test_noise_is_predicted_on_the_grid_on_which_it_is_drawn():
    """White noise is not preserved by resizing, so that the paper's UNet resizes before the noise is added."""
    small = {"preset": "paper", "sample_size": 64}
    assert make_unet(make_config(DiffusionConfig, **small)).noise_grid is None
    for kind in ("epsilon", "v_prediction"):
        assert make_unet(make_config(DiffusionConfig, **small, prediction_type=kind)).noise_grid == (64, 64, 64)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_prediction_type_is_saved_and_sampled(prediction_type, tmp_path):
    task = make_task(prediction_type=prediction_type)
    task.save(tmp_path)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["prediction_type"], saved["num_train_timesteps"]) == (prediction_type, STEPS)
    task.preview(1, tmp_path / "previews")
    assert (tmp_path / "previews" / "samples-00000001.png").stat().st_size > 1000


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_clean_prediction_of_a_trained_model(prediction_type, tmp_path):
    """The teacher's clean prediction in structure discovery, from the formulas of the three types."""
    make_task(prediction_type=prediction_type).save(tmp_path)
    teacher = load_teacher(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    volume, noise = torch.rand(1, 1, 8, 8, 8, generator=generator), torch.randn(1, 1, 8, 8, 8, generator=generator)
    for timestep in (3, 30):
        a = alpha_bar([timestep])
        noisy = a.sqrt() * (2 * volume.double() - 1) + (1 - a).sqrt() * noise.double()
        with torch.no_grad():
            prediction = teacher.unet(noisy.float(), torch.tensor([timestep])).sample.double()
        clean = {
            "sample": prediction,
            "epsilon": (noisy - (1 - a).sqrt() * prediction) / a.sqrt(),
            "v_prediction": a.sqrt() * noisy - (1 - a).sqrt() * prediction,
        }[prediction_type]
        found = teacher.extract(volume, noise[None], timestep, (1,), denoised=True).denoised
        torch.testing.assert_close(found.double(), (clean.clamp(-1, 1) + 1) / 2, rtol=0, atol=2e-5)
