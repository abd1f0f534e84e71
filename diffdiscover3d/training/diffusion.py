"""Diffusion pretraining: a UNet learns to predict clean volumes from noisy ones (section 2 of the paper)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel, compute_snr

from diffdiscover3d.models.loading import cast_weights
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline, make_ddim_scheduler
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.training.config import DiffusionConfig
from diffdiscover3d.training.data_order import draw_noise, draw_noise_seed


def make_unet(config: DiffusionConfig, mixed_shapes: bool = False) -> UNet3DModel:
    """Create the UNet of a config: its preset with the width and grid options applied.

    Args:
        mixed_shapes: whether the volumes differ in shape. They are then resized to the internal grid before noise is
            added, so that they can be batched. So are all volumes if noise or velocity is predicted, because white
            noise is not preserved by resizing.
    """
    options = dict(UNET_PRESETS[config.preset])
    if config.width is not None:
        options["width"] = config.width
    if config.sample_size is not None:
        size = tuple(config.sample_size)
        options["sample_size"] = size[0] if len(size) == 1 else size
    if config.pad:
        options |= {"sample_size": None, "resize_before_noise": False}
    if (mixed_shapes or config.prediction_type != "sample") and options["sample_size"] is not None:
        options["resize_before_noise"] = True
    return UNet3DModel(**options)


class DiffusionTraining:
    """The diffusion pretraining task: UNet, noise and loss (L1 by default).

    Args:
        config: training options.
        common_grid: the common shape (H, W, D) of all volumes; `None` if they differ and are resampled to the UNet's
            grid.

    Raises:
        ValueError: if `volume_size` is given for a UNet with an internal grid, or the volumes differ in shape and
            there is no grid to resample them to.
    """

    name = "diffusion"
    suits_graphs = True  # the losses depend on the tensors of the batch alone
    has_one_shape = True
    device = torch.device("cpu")

    def __init__(self, config: DiffusionConfig, common_grid: tuple[int, int, int] | None):
        torch.manual_seed(config.seed)
        self.config = config
        self.model = make_unet(config, mixed_shapes=common_grid is None)
        if config.volume_size and self.model.config.sample_size is not None:
            raise ValueError("`volume_size` requires --pad: this UNet has an internal grid, set by --sample-size.")
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.scheduler = make_scheduler(config.num_train_timesteps, config.prediction_type)
        self.ema = EMAModel(self.model.parameters(), decay=config.ema_decay, foreach=True)
        self._ema_is_placed = False
        self.volume_grid = config.volume_size or self.model.noise_grid
        if self.volume_grid is None and common_grid is None:
            raise ValueError("the volumes differ in shape: give --volume-size to resample them to a common grid.")
        self.sample_grid = self.volume_grid or common_grid

    def draw(self, volume: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw timestep and noise of one (1, H, W, D) volume.

        Returns:
            "timestep": scalar int64 in [0, T); "noise": (1, H, W, D) standard normal, or on a GPU "noise_seed": scalar
            int64 from which [`prepare`] draws the noise on the device.
        """
        timestep = torch.randint(self.config.num_train_timesteps, (), generator=generator)
        if self.device.type == "cuda":  # the noise itself is drawn there
            return {"timestep": timestep, "noise_seed": draw_noise_seed(generator)}
        return {"timestep": timestep, "noise": torch.randn(volume.shape, generator=generator)}

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The input of `losses` for a batch of volumes in [0, 1] and what `draw` returned for them.

        Returns:
            "volume" and "noise": (B, 1, H, W, D) float32; "timestep": (B,) int64.
        """
        noise = batch.get("noise")
        if noise is None:
            noise = draw_noise(batch["noise_seed"].tolist(), batch["volume"].shape[1:], batch["volume"].device)
        return {"volume": batch["volume"], "timestep": batch["timestep"], "noise": noise}

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The distance of a batch from `prepare` to its `target`: a scalar "loss", averaged over voxels and volumes."""
        clean, noise, timestep = 2 * batch["volume"] - 1, batch["noise"], batch["timestep"]
        noisy = self.scheduler.add_noise(clean, noise, timestep)  # Eq. 2, in float32
        predicted = model(noisy, timestep).sample.float()
        target = self.target(clean, noise, timestep)
        distance = F.l1_loss if self.config.loss_type == "l1" else F.mse_loss
        if self.config.snr_gamma is None:
            return {"loss": distance(predicted, target)}
        weights = min_snr_weights(
            compute_snr(self.scheduler, timestep), self.config.snr_gamma, self.config.prediction_type
        )
        if self.config.loss_type == "l1":
            weights = weights.sqrt()  # the weights are those of squared differences
        return {"loss": (weights * distance(predicted, target, reduction="none").flatten(1).mean(dim=1)).mean()}

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the UNet predicts, by `prediction_type`: the clean volumes in [-1, 1], the noise, or the velocity.

        Args:
            clean, noise: (B, 1, H, W, D).
            timestep: (B,) integers.
        """
        if self.config.prediction_type == "sample":
            return clean
        if self.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(clean, noise, timestep)

    def compile(self) -> None:
        if self.device.type == "cuda":
            self.model.fuse_kernels()
        else:
            self.model.compile()

    def has_metrics_after(self, step: int) -> bool:
        return False

    def after_step(self, step: int) -> dict[str, float]:
        if not self._ema_is_placed:
            # averages of another device or memory format would be updated tensor by tensor
            pairs = zip(self.ema.shadow_params, self.model.parameters(), strict=True)
            self.ema.shadow_params = [torch.empty_like(p).copy_(shadow).detach() for shadow, p in pairs]
            self._ema_is_placed = True
        self.ema.step(self.model.parameters())
        return {}

    def preview(self, step: int, folder: Path) -> None:
        pipeline = VolumeGenerationPipeline(self.model, make_ddim_scheduler(self.scheduler))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(self.config.seed)
        with self._averaged_weights():
            samples = pipeline(self.sample_grid, batch_size=3, num_inference_steps=20, generator=generator).volumes
        save_slices(folder / f"samples-{step:08d}.png", [s.cpu().numpy() for s in samples[:, 0]])

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Within the context the model has its averaged weights; after it, also after an error, its own again."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.model.parameters())
            self.model.train()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        state = self.ema.state_dict()
        shadow = {str(i): p for i, p in enumerate(state["shadow_params"])}
        return {"ema": {**shadow, "step": torch.tensor(state["optimization_step"])}}

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        ema = dict(tensors["ema"])
        step = int(ema.pop("step"))
        shadow = [ema[str(i)] for i in range(len(ema))]
        self.ema.load_state_dict({**self.ema.state_dict(), "optimization_step": step, "shadow_params": shadow})
        self._ema_is_placed = False

    def save(self, folder: Path, final: bool = True) -> None:
        """Save the averaged weights as a pipeline folder."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model.parameters())
        cast_weights(model, self.config.save_dtype)
        DiffusionFeaturePipeline(model.eval(), self.scheduler).save_pretrained(folder)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR weights of the squared error (Hang et al., ICCV 2023): min(SNR, gamma) of the clean volume's error.

    The errors of clean volume, noise and velocity are related by |noise error|² = SNR |clean error|² and
    |velocity error|² = (SNR + 1) |clean error|², by which the weights of "epsilon" and "v_prediction" are divided.

    Args:
        snr: (B,) signal-to-noise ratios, above 0.

    Returns:
        (B,) weights.
    """
    weights = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return weights / snr
    return weights / (snr + 1) if prediction_type == "v_prediction" else weights
