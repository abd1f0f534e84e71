"""Which schedulers of diffusers fit the pipelines, and conversions of the network's prediction.

The pipelines need a scheduler of the DDPM family, with discrete timesteps of one noise schedule,
x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, and a network that predicts x_0 ("sample"), ε ("epsilon") or
v = √ᾱ_t ε - √(1-ᾱ_t) x_0 ("v_prediction").
v = √ᾱ_t ε - √(1-ᾱ_t) x_0 ("v_prediction").
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")
_TOLERANCE = 1e-4  # of ᾱ; schedulers compute the same schedule in different precision
_METHODS = ("set_timesteps", "scale_model_input", "step")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule and the kind of prediction that a diffusion model was trained with.

    Attributes:
        alphas_cumprod: (T,) float32, ᾱ_t.
        prediction_type: one of `PREDICTION_TYPES`.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler) -> "NoiseSchedule":
        """The schedule of a scheduler.

        Raises:
            ValueError: if it is not of the DDPM family.
        """
        name = type(scheduler).__name__
        if not isinstance(scheduler, SchedulerMixin):
            raise ValueError(f"`scheduler` must be a scheduler of diffusers, got {name}.")
        alphas, missing = getattr(scheduler, "alphas_cumprod", None), [m for m in _METHODS if not hasattr(scheduler, m)]
        if not isinstance(alphas, torch.Tensor) or missing:
            reason = f"lacks {', '.join(missing)}" if missing else "has no `alphas_cumprod`"
            raise ValueError(
                f"{name} does not fit: it {reason}, so it is not of the DDPM family, with which the network was "
                "trained. Use another, for example DDPMScheduler, DDIMScheduler or EulerDiscreteScheduler."
            )
        kind = scheduler.config.get("prediction_type")
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` of the scheduler must be one of {PREDICTION_TYPES}, got {kind!r}.")
        return cls(alphas, kind)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Eq. 2 in float32, x_t of clean volumes x_0, as `DDPMScheduler.add_noise`.

        `add_noise` of other schedulers may scale differently, or accept only the timesteps of the last sampling.
        """
        alpha = self.alphas_cumprod[timestep].cpu()  # a tensor without axes, which may be on another device
        return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise

    def predict_clean(self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: int) -> torch.Tensor:
        """The clean volume x_0 from the network's prediction at x_t, both (B, C, H, W, D)."""
        if self.prediction_type == "sample":
            return prediction
        alpha = self.alphas_cumprod[timestep].cpu()
        if self.prediction_type == "epsilon":
            return (noisy - (1 - alpha) ** 0.5 * prediction) / alpha**0.5
        return alpha**0.5 * noisy - (1 - alpha) ** 0.5 * prediction

    def check(self, scheduler) -> None:
        """Refuse a scheduler that would give wrong results with a model trained on this schedule.

        Raises:
            ValueError: if it is not of the DDPM family, has another noise schedule or prediction type.
        """
        name, other = type(scheduler).__name__, NoiseSchedule.of(scheduler)
        remedy = f"convert the pipeline's own: {name}.from_config(pipe.scheduler.config)."
        if other.prediction_type != self.prediction_type:
            raise ValueError(
                f"{name} expects the prediction type {other.prediction_type!r}, the model predicts "
                f"{self.prediction_type!r}; {remedy}"
            )
        mine, theirs = self.alphas_cumprod.cpu().float(), other.alphas_cumprod.cpu().float()
        if len(mine) != len(theirs):
            raise ValueError(
                f"{name} has {len(theirs)} timesteps, the model was trained with {len(mine)}; convert the pipeline's "
                f"own: {name}.from_config(pipe.scheduler.config, num_train_timesteps={len(mine)})."
            )
        if (difference := float((mine - theirs).abs().max())) > _TOLERANCE:
            raise ValueError(
                f"{name} has another noise schedule than the model was trained with (they differ by up to "
                f"{difference:.2g} in `alphas_cumprod`); {remedy}"
            )


def check_sampling(scheduler, num_inference_steps: int) -> None:
    """Try a copy of a scheduler on a few voxels, and refuse it if it cannot sample.

    Some schedulers implement only some prediction types, need further arguments or run forwards in time.

    Raises:
        ValueError: with the reason.
    """
    name, trial = type(scheduler).__name__, copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    sample = torch.zeros(1, 1, 2, 2, 2)
    try:
        trial.set_timesteps(num_inference_steps)
        times = torch.as_tensor(trial.timesteps).double()
        steps = step_arguments(trial, generator)
        for t in trial.timesteps[:4]:
            prediction = torch.full_like(trial.scale_model_input(sample, t), 0.1)
            sample = trial.step(prediction, t, sample, **steps).prev_sample
    except (NotImplementedError, ValueError, TypeError, ImportError, IndexError) as error:
        raise ValueError(f"{name} does not fit: {' '.join(str(error).split())}") from error
    if len(times) > 1 and times[0] < times[-1]:
        raise ValueError(f"{name} does not fit: it goes from volumes to noise; use the scheduler that it inverts.")
    if not torch.isfinite(times).all() or not torch.isfinite(sample).all():
        raise ValueError(f"{name} does not fit: with this noise schedule it gives timesteps or samples that are NaN.")


def step_arguments(scheduler, generator, eta: float = 0.0) -> dict:
    """The arguments of `scheduler.step` beyond the prediction that this scheduler takes: `generator`, `eta`."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in known}
