"""Structure discovery: train the segmentation network with the three unsupervised losses (section 3 of the paper)."""

import copy
import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from diffdiscover3d.data.loading import common_grid, grid_shapes, grid_spacing
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import ModelError
from diffdiscover3d.losses import photometric_invariance, region_consistency
from diffdiscover3d.models.cpu_kernels import Conv3d
from diffdiscover3d.models.loading import cast_weights
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.training.assignments import Assignments, part_families, spatial_terms
from diffdiscover3d.training.config import DiscoveryConfig
from diffdiscover3d.training.data_order import draw_noise, draw_noise_seed
from diffdiscover3d.training.nesting import choose_children, divided_parts, parent_masks, parent_matrix
from diffdiscover3d.training.precision import FORMATS
from diffdiscover3d.training.schedules import EXTENDABLE_SCHEDULES
from diffdiscover3d.training.teacher_signals import TeacherSignals
from diffdiscover3d.utils.files import write_json

logger = logging.getLogger("diffdiscover3d")
_SELECTION_VOLUMES = 32  # maximum number of volumes for selecting the epoch


class DiscoveryTraining:
    """The structure discovery task: segmentation network, frozen teacher and losses.

    Args:
        config: training options.
        teacher: the pretrained diffusion model.
        volumes: training volumes; resampled to the median shape if their shapes differ and they have no target spacing.
            The attribute of this name holds the volumes of the training steps: with assigned parts, the reliable ones.
        selection_volumes: volumes whose mean confidence selects the epoch to save; no labels are used.
        accelerator: the accelerator of the training.
        start: trained network that provides the initial weights; default: random initialisation.
        parent: trained network whose parts are subdivided.

    Raises:
        ModelError: if `start` has a different number of parts.
        ValueError: if the options are incompatible with the teacher or the parent.
    """

    name = "discovery"

    def __init__(
        self,
        config: DiscoveryConfig,
        teacher: DiffusionFeaturePipeline,
        volumes: Sequence[dict],
        selection_volumes: Sequence[dict],
        accelerator: Accelerator,
        start: StructureDiscoveryModel | None = None,
        parent: StructureDiscoveryModel | None = None,
    ):
        torch.manual_seed(config.seed if config.init_seed is None else config.init_seed)
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        _check_teacher(config, teacher)
        self.teacher = teacher.to(accelerator.device)
        self.teacher.unet.eval().requires_grad_(False).to(memory_format=FORMATS[config.memory_format])
        self.model = start or self._new_model(parent, volumes)
        if self.model.config.num_parts != config.num_parts:
            raise ModelError(
                f"`init_from` has {self.model.config.num_parts} parts and --num-parts is {config.num_parts}; "
                "they must be equal."
            )
        if getattr(volumes, "working_grid", None) and self.model.config.spacing is None:
            raise ValueError(
                f"`spacing` must be left out, got {config.spacing}: the network of --init-from or --parent has none."
            )
        self.model.to(accelerator.device)
        self.teacher_signals = TeacherSignals(config, self.teacher, self.model)
        shared = common_grid(volumes)
        kept = shared or getattr(volumes, "working_grid", None)  # each volume keeps its own grid
        self.volume_grid = config.volume_size or (None if kept else median_grid(volumes))
        self.has_one_shape = shared is not None or self.volume_grid is not None
        if kept is None and config.volume_size is None:
            logger.info("volumes differ in shape: resampling all to %s (set by --volume-size)", self.volume_grid)
        self.spacing = config.spacing or grid_spacing(volumes, self.volume_grid)
        self.noise_grid = teacher.unet.noise_grid or self.volume_grid or shared
        self.selection_volumes, self.volumes, self.assignments = selection_volumes, volumes, None
        if config.objective == "assignment":
            given = (config, self.teacher, self.model, start, volumes, self.volume_grid, accelerator)
            self.assignments = Assignments(*given, spacing=self.spacing)
            self.volumes = Subset(volumes, self.assignments.used)
            self.volumes.split_ids = getattr(volumes, "split_ids", None)
        self.epoch_steps = math.ceil(len(self.volumes) / config.batch_size)
        self.best: dict[str, torch.Tensor] | None = None
        self.best_confidence, self.best_step = 0.0, 0
        # the state of `best` before a last step within an epoch, for a training that may be extended
        self._epoch_best: dict[str, torch.Tensor] | None = None
        self._may_be_extended = config.lr_schedule in EXTENDABLE_SCHEDULES

    def _new_model(self, parent: StructureDiscoveryModel | None, volumes: Sequence[dict]) -> StructureDiscoveryModel:
        config = self.config
        if parent is None:
            working = getattr(volumes, "working_grid", None)
            target = {} if working is None else {"spacing": working.spacing, "spacing_unit": working.unit}
            return StructureDiscoveryModel(config.num_parts, dropout=config.dropout, norm=config.norm, **target)
        children = config.children
        if children is None:
            parent = parent.to(self.accelerator.device)
            children = choose_children(parent, self.teacher, volumes, config)
            logger.info("the %d parts of the parent are divided into %s parts", parent.config.num_parts, children)
        elif sum(children) != config.num_parts:
            raise ValueError(f"`children` must sum to `num_parts` ({config.num_parts}), got {children}.")
        return StructureDiscoveryModel.from_parent(parent, children, dropout=config.dropout, norm=config.norm)

    @property
    def suits_graphs(self) -> bool:
        """Whether steps are replayed as CUDA graphs by default.

        Robust scaling selects the foreground's voxels, whose number differs.
        """
        return self.model.config.scaling == "min_max"

    @cached_property
    def _division(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The parts predicted by the network, and the matrix of their parents.

        Cached on the device to avoid a synchronisation at every step.
        """
        divided = torch.tensor(divided_parts(self.model), device=self.accelerator.device)
        return divided, parent_matrix(self.model)

    @cached_property
    def _families(self) -> list[tuple[int, ...]]:
        return part_families(self.model)

    def draw(self, volume: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw the random numbers of one (1, H, W, D) volume.

        Returns:
            "gamma": scalar in `gamma_range`; "inverted": scalar bool. With assigned parts also "recolor": (K,) standard
            normal, and "recolored": scalar bool. With fresh noise of the teacher also "noise": (timesteps x num_noise,
            1, h, w, d) standard normal, or on a GPU "noise_seed": scalar int64.
        """
        low, high = self.config.gamma_range
        drawn = {
            "gamma": low + (high - low) * torch.rand((), generator=generator),
            "inverted": torch.rand((), generator=generator) < self.config.invert_probability,
        }
        if self.assignments is not None:
            drawn["recolor"] = torch.randn(self.config.num_parts, generator=generator)
            drawn["recolored"] = torch.rand((), generator=generator) < self.config.recolor_probability
            return drawn
        if self.teacher_signals.fixed:
            return drawn
        if self.device.type == "cuda":  # the noise itself is drawn there
            return {**drawn, "noise_seed": draw_noise_seed(generator)}
        return {**drawn, "noise": self.teacher_signals.draw(self.noise_grid or tuple(volume.shape[1:]), generator)}

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict:
        """The input of `losses` for a batch of volumes in [0, 1] and what `draw` returned for them.

        Returns:
            "volume": (B, 1, H, W, D) float32; "gamma": (B,); "inverted": (B,) bool; and "noise": (B, timesteps x
            num_noise, 1, h, w, d), or the fields of [`TeacherOutput`] if they are computed outside of the losses. With
            assigned parts, the entries of [`Assignments.prepare`].
        """
        if self.assignments is not None:
            return self.assignments.prepare(batch)
        volume = batch["volume"]
        if "noise_seed" in batch:
            shape = self.teacher_signals.noise_shape(self.noise_grid or tuple(volume.shape[2:]))
            batch = {**batch, "noise": draw_noise(batch["noise_seed"].tolist(), shape, volume.device)}
        prepared = {"volume": volume, "gamma": batch["gamma"], "inverted": batch["inverted"]}
        if (
            not self.teacher_signals.fixed and self.model.parent_model is None
        ):  # without host values: part of the losses
            return {**prepared, "noise": batch["noise"]}
        return {**prepared, **self._teacher_output(batch)}

    def _teacher_output(self, batch: dict[str, torch.Tensor]) -> dict:
        with self.accelerator.autocast():
            return vars(self.teacher_signals(batch))

    def losses(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """The weighted terms of Eq. 4 for a batch from `prepare`, as scalars, and "loss": their sum.

        Args:
            model: the segmentation network. It is called once, with the (2B, 1, H, W, D) volumes and their changed
                copies.
            batch: as returned by `prepare`. With assigned parts see [`Assignments.losses`].
        """
        if self.assignments is not None:
            return self.assignments.losses(model, batch)
        if "noise" in batch:
            batch = {**batch, **self._teacher_output(batch)}
        config, volume = self.config, batch["volume"]
        gamma, inverted = (batch[name][:, None, None, None, None] for name in ("gamma", "inverted"))
        changed = torch.where(inverted, 1 - volume**gamma, volume**gamma)
        parent_labels = None if batch["parent_labels"] is None else batch["parent_labels"].repeat(2, 1, 1, 1, 1)
        views = torch.cat([volume, changed])  # one pass for both
        both = model(views, parent_labels).logits.float().softmax(dim=1)
        masks, masks_changed = both.chunk(2)
        divided, parents = self._division
        relative = config.relative_consistency
        within = parent_masks(masks, parents) if relative and parents is not None else None

        def consistency(h, extent=None):
            return region_consistency(masks, h, extent, relative, within)

        terms = {}
        if config.lambda_feature > 0:
            terms["feature"] = config.lambda_feature * consistency(batch["features"], batch["extent"])  # Eq. 6
        if config.lambda_visual > 0:
            terms["visual"] = config.lambda_visual * consistency(volume)  # Eq. 7
        if config.lambda_invariance > 0:  # Eq. 8
            distance = photometric_invariance(masks[:, divided], masks_changed[:, divided])
            terms["invariance"] = config.lambda_invariance * distance
        if config.lambda_denoised > 0:  # not in the paper: Eq. 7 on the clean prediction of the teacher
            terms["denoised"] = config.lambda_denoised * consistency(batch["denoised"])
        terms |= spatial_terms(config, masks, self._families, self.spacing)
        return {"loss": sum(terms.values()), **terms}  # Eq. 4

    def compile(self) -> None:
        if self.device.type == "cuda":
            self.teacher.unet.fuse_kernels()
            return
        self.teacher.unet.compile()
        # slot dropout breaks the graph; release the custom convolutions, which would be compiled separately
        Conv3d.release(self.model.network).compile()

    def has_metrics_after(self, step: int) -> bool:
        ends_epoch = step % self.epoch_steps == 0 and self.config.selection == "confidence"
        return ends_epoch or step == self.config.max_steps

    def after_step(self, step: int) -> dict[str, float]:
        """At the end of an epoch, compute the mean confidence and keep the weights if it is the highest so far."""
        if not (self.accelerator.is_main_process and self.has_metrics_after(step)):
            return {}
        confidence = self.mean_confidence()
        better = self.best is None or confidence > self.best_confidence or self.config.selection == "last"
        if better and math.isfinite(confidence):
            if self._may_be_extended and self.config.selection == "confidence" and step % self.epoch_steps:
                self._epoch_best = self._packed_best()
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.best_confidence, self.best_step = confidence, step
        return {"confidence": confidence}

    @torch.no_grad()
    def mean_confidence(self) -> float:
        """Mean probability of the most probable part over the voxels of the selection volumes."""
        confidences = [self._segment(v).probabilities.amax(dim=1).mean() for v in self._selection()]
        return float(torch.stack(confidences).mean())

    def preview(self, step: int, folder: Path) -> None:
        volumes = [v for _, v in zip(range(3), self._selection(), strict=False)]
        labels = [self._segment(v).labels[0].cpu().numpy() for v in volumes]
        pictures = [v[0].cpu().numpy() for v in volumes]
        save_slices(folder / f"parts-{step:08d}.png", pictures, labels, num_parts=self.config.num_parts)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        if self.best is None:
            return {}
        before = {} if self._epoch_best is None else {"epoch_best": self._epoch_best}
        return {"best": self._packed_best(), **before}

    def _packed_best(self) -> dict[str, torch.Tensor]:
        selection = torch.tensor([self.best_confidence, self.best_step], dtype=torch.float64)
        return {**(self.best or {}), "selection": selection}

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore the selected epoch; not that of an earlier last step of a training that is extended."""
        packed = tensors.get("best")
        if packed is None:
            return
        extended = int(packed["selection"][1]) < self.config.max_steps
        if extended and self.config.selection == "last":
            return
        best = dict(tensors["epoch_best"] if extended and "epoch_best" in tensors else packed)
        confidence, step = best.pop("selection").tolist()
        self.best, self.best_confidence, self.best_step = best or None, confidence, int(step)

    def save(self, folder: Path, final: bool = True) -> None:
        """Save the selected network, with its parts sorted by decreasing size over the selection volumes.

        Before an epoch is selected, and if this is not the final model, the network as it is.

        Raises:
            ModelError: if the model is final and no epoch was selected, as the confidence was never finite.
        """
        if self.best is None and final:
            raise ModelError(
                "the network's confidence was not finite at the end of any epoch, so no epoch can be selected; lower "
                "--learning-rate, or use --mixed-precision no."
            )
        model = copy.deepcopy(self.model)
        if self.best is not None:
            model.load_state_dict(self.best)
        sizes = sum(model.segment(v[None]).probabilities.mean(dim=(0, 2, 3, 4)) for v in self._selection())
        model.order_parts(sizes)
        cast_weights(model, self.config.save_dtype)
        model.register_to_config(_name_or_path="")  # local paths are stripped
        model.save_pretrained(folder)
        if self.best is not None:
            selected = {"kept_step": self.best_step, "mean_confidence": self.best_confidence}
            write_json(folder / "selection.json", selected)

    def _selection(self):
        for i in range(min(len(self.selection_volumes), _SELECTION_VOLUMES)):
            volume = self.selection_volumes[i]["volume"]
            yield volume if self.volume_grid is None else resize_volume(volume[None], self.volume_grid)[0]

    def _segment(self, volume: torch.Tensor):
        return self.model.segment(volume[None])


def _check_teacher(config: DiscoveryConfig, teacher: DiffusionFeaturePipeline) -> None:
    steps, num_stages = teacher.scheduler.config.num_train_timesteps, teacher.unet.num_stages
    for name, values in (("timestep", [config.timestep]), ("denoised_timesteps", config.denoised_timesteps)):
        if not 0 <= min(values) <= max(values) < steps:
            raise ValueError(f"`{name}` must be in 0..{steps - 1} for this teacher, got {getattr(config, name)}.")
    if max(config.stages) > num_stages:
        raise ValueError(f"`stages` must be in 1..{num_stages} for this teacher, got {config.stages}.")


def median_grid(volumes: Sequence[dict]) -> tuple[int, int, int]:
    """The median of the volumes' shapes along each axis."""
    shapes = torch.tensor(grid_shapes(volumes))
    return tuple(int(n) for n in shapes.median(dim=0).values)
