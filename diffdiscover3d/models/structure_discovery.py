"""The segmentation network f of the paper: a volume in, K soft parts out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor
from diffdiscover3d.data.transforms import min_max_normalize, pad_to_multiple
from diffdiscover3d.models.blocks import Conv3d, precise_if_small
from diffdiscover3d.models.loading import StrictLoadingMixin
from diffdiscover3d.models.window_layout import taken_at_once

_VIEW_RANGE = 4.0  # standard deviations


@dataclass
class StructureDiscoveryOutput(BaseOutput):
    """Output of [`StructureDiscoveryModel`]: `logits`, (B, K, H, W, D); their softmax over K are the soft parts.

    Where a part would lie outside its parent, its logit is minus infinity.
    """

    logits: torch.Tensor


@dataclass
class Segmentation(BaseOutput):
    """Output of [`StructureDiscoveryModel.segment`].

    Attributes:
        labels: (B, H, W, D) uint8 (int32 past 256 parts), the most probable part of every voxel.
        probabilities: (B, K, H, W, D) float32, summing to 1 over K.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor


class StructureDiscoveryModel(StrictLoadingMixin, ModelMixin, ConfigMixin):
    """3D U-Net that divides a volume into K parts, largest first, or divides the parts of a coarser model further.

    Args:
        num_parts: K.
        channels, strides: of the MONAI U-Net, as the authors chose them.
        dropout: probability.
        norm: "batch" (the authors' choice) or "instance".
        window_size: side of a cube that is segmented at once, as is any volume of no more voxels; over a larger one a
            window of this side slides.
        parent: configuration of the model whose parts this one divides; `None`: it divides the whole volume. The
            parent is a part of this model, frozen, and saved with it (not in the paper).
        children: into how many parts each of the parent's parts is divided; 1 keeps it whole. They sum to K.

    Raises:
        ValueError: if there are fewer than two parts, strides do not fit channels, or children do not fit the parent.

    Example:
        >>> coarse = StructureDiscoveryModel(num_parts=2)
        >>> fine = StructureDiscoveryModel.inside(coarse, children=(1, 3))
        >>> fine.config.num_parts, fine.parents
        (4, (0, 1, 1, 1))
    """

    @register_to_config
    def __init__(
        self,
        num_parts: int = 2,
        channels: Sequence[int] = (8, 16, 16, 32, 32, 64, 64),
        strides: Sequence[int] = (1, 2, 1, 2, 1, 2),
        dropout: float = 0.2,
        norm: str = "batch",
        window_size: int = 256,
        parent: dict | None = None,
        children: Sequence[int] | None = None,
    ):
        super().__init__()
        if num_parts < 2:
            raise ValueError(f"`num_parts` must be at least 2, got {num_parts}.")
        _check_children(num_parts, parent, children)
        if len(strides) != len(channels) - 1:
            raise ValueError(f"`strides` must have {len(channels) - 1} entries, one less than `channels`.")
        from monai.networks.nets import UNet  # several seconds: only when a network is made

        self.stride = int(torch.tensor(list(strides)).prod())
        # one output for every part that is not simply a part of the parent
        outputs = num_parts if parent is None else sum(c for c in children if c > 1)
        network = UNet(3, 1, outputs, tuple(channels), tuple(strides), dropout=dropout, norm=norm)
        self.network = Conv3d.adopt(network)
        self.register_buffer("part_order", torch.arange(num_parts))
        self.parent_model = None if parent is None else StructureDiscoveryModel(**parent).requires_grad_(False).eval()

    @classmethod
    def inside(cls, parent: "StructureDiscoveryModel", children: Sequence[int], **config) -> "StructureDiscoveryModel":
        """A new model that divides the parts of a trained one; `config` as for the class."""
        settings = {k: v for k, v in parent.config.items() if not k.startswith("_")}
        model = cls(num_parts=sum(children), parent=settings, children=tuple(children), **config)
        model.parent_model.load_state_dict(parent.state_dict())
        return model

    @property
    def parents(self) -> tuple[int, ...] | None:
        """For each part the part of the parent in which it lies; `None` without a parent."""
        if self.parent_model is None:
            return None
        of_output = [part for part, count in enumerate(self.config.children) for _ in range(count)]
        return tuple(of_output[i] for i in self.part_order.tolist())

    @property
    def levels(self) -> tuple["StructureDiscoveryModel", ...]:
        """The models of the hierarchy, the coarsest first, this one last."""
        return (*(self.parent_model.levels if self.parent_model is not None else ()), self)

    def train(self, mode: bool = True) -> "StructureDiscoveryModel":
        """As for any module; a parent stays in evaluation mode, since it is not trained."""
        super().train(mode)
        if self.parent_model is not None:
            self.parent_model.eval()
        return self

    def forward(self, volume: torch.Tensor, parent_labels: torch.Tensor | None = None) -> StructureDiscoveryOutput:
        """Logits of the parts.

        Args:
            volume: (B, 1, H, W, D), any grid and any intensities: each volume is min-max normalised.
            parent_labels: (B, 1, H, W, D) parts of the parent, where they are known already.

        Raises:
            InputError: if a volume has no contrast, or holds NaN or Inf.
        """
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"`volume` must be (batch, 1, H, W, D), got shape {tuple(volume.shape)}.")
        normalized = min_max_normalize(volume, check=not self.training)  # a training has checked them all before
        if parent_labels is None:
            parent_labels = self._parent_labels(normalized)
        return StructureDiscoveryOutput(logits=self._logits(self._view(normalized, parent_labels), parent_labels))

    @torch.no_grad()
    def label_parents(self, volume: torch.Tensor) -> torch.Tensor | None:
        """The parts of the parent, (B, 1, H, W, D), for volumes as in `forward`; `None` without a parent."""
        return self._parent_labels(min_max_normalize(volume, check=not self.training))

    @torch.no_grad()
    def segment(self, volume, progress: bool = False, parent_labels: torch.Tensor | None = None) -> Segmentation:
        """Divide volumes of any size into parts.

        Args:
            volume: an array or tensor of shape (H, W, D), (B, H, W, D) or (B, 1, H, W, D), any intensities; or
                whatever else [`as_volume_tensor`] takes.
            progress: show a bar while a window slides.
            parent_labels: (B, H, W, D) parts of the parent, where they are known already.

        Raises:
            InputError: if a volume has no contrast, or holds NaN or Inf.
        """
        volume = as_volume_tensor(volume)
        was_training = self.training
        self.eval()
        normalized = min_max_normalize(volume.to(self.device))
        known = None if parent_labels is None else parent_labels[:, None].to(self.device)
        probabilities = self._probabilities(normalized, progress, known)
        self.train(was_training)
        dtype = torch.uint8 if self.config.num_parts <= 256 else torch.int32
        return Segmentation(labels=probabilities.max(dim=1).indices.to(dtype), probabilities=probabilities)

    @torch.no_grad()
    def segment_window(
        self,
        normalized: torch.Tensor,
        parent_labels: torch.Tensor | None = None,
        moments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The soft parts of one window of a volume that is not in memory, from what was found of the whole volume.

        Args:
            normalized: (B, 1, h, w, d), no more voxels than are taken at once, where the whole volume lies in [0, 1].
            parent_labels: (B, 1, h, w, d) parts of the parent; `None` without a parent.
            moments: (parts of the parent, 2) mean and standard deviation in each of them over the whole volume,
                normalised; `None` without a parent.

        Returns:
            (B, K, h, w, d) float32, summing to 1 over K.
        """
        return self._logits(self._view(normalized, parent_labels, moments), parent_labels).float().softmax(dim=1)

    def order_parts(self, sizes: torch.Tensor) -> None:
        """Renumber the parts, largest first.

        Args:
            sizes: (K,) mean size of each part, in the present order.
        """
        order = torch.argsort(sizes.to(self.part_order.device), descending=True, stable=True)
        self.part_order.copy_(self.part_order[order])

    @torch.no_grad()
    def _parent_labels(self, normalized: torch.Tensor, progress: bool = False) -> torch.Tensor | None:
        if self.parent_model is None:
            return None
        # several times faster than argmax on a CPU
        return self.parent_model._probabilities(normalized, progress).max(dim=1, keepdim=True).indices

    def _view(
        self, normalized: torch.Tensor, parent_labels: torch.Tensor | None, moments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the network sees: the volume, or each part that is to be divided, standardised for itself.

        The contrast between parents is already spent: what lies in one of them would be a small ripple beside it.
        """
        if parent_labels is None:
            return normalized
        view = torch.zeros_like(normalized)
        for part, count in enumerate(self.config.children):
            if count > 1:
                within = (parent_labels == part).to(normalized.dtype)
                mean, spread = _moments(normalized, within) if moments is None else moments[part]
                centred = (normalized - mean) * within
                view = view + (centred / spread.clamp(min=1e-6)).clamp(-_VIEW_RANGE, _VIEW_RANGE)
        return view

    def _logits(self, view: torch.Tensor, parent_labels: torch.Tensor | None) -> torch.Tensor:
        h, w, d = view.shape[2:]
        padded = pad_to_multiple(view, self.stride)
        if max(padded.shape[2:]) <= self.stride:  # a single voxel would be left on the coarsest grid: nothing to norm
            padded = pad_to_multiple(view, 2 * self.stride)
        with precise_if_small(padded, self.stride):
            logits = self.network(padded)[:, :, :h, :w, :d]
        if parent_labels is not None:
            logits = self._keep_inside(logits, parent_labels)
        return logits[:, self.part_order]

    def _keep_inside(self, logits: torch.Tensor, parent_labels: torch.Tensor) -> torch.Tensor:
        """Logits of all K parts from those of the divided ones: minus infinity outside of each part's parent."""
        columns, used = [], 0
        for part, count in enumerate(self.config.children):
            within = parent_labels == part
            if count == 1:
                inside = torch.zeros_like(logits[:, :1])
            else:
                inside = logits[:, used : used + count]
                used += count
            columns.append(inside.masked_fill(~within, -torch.inf))
        return torch.cat(columns, dim=1)

    def _probabilities(
        self, normalized: torch.Tensor, progress: bool = False, parent_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        window = self.config.window_size
        # both of the whole volume, so that windows can neither disagree on a parent nor on what is bright in it
        if parent_labels is None:
            parent_labels = self._parent_labels(normalized, progress)
        view = self._view(normalized, parent_labels)
        if taken_at_once(view.shape[2:], self.config):
            return self._logits(view, parent_labels).float().softmax(dim=1)
        from monai.inferers import sliding_window_inference

        def predict(x: torch.Tensor) -> torch.Tensor:
            return self._logits(x[:, :1], None if parent_labels is None else x[:, 1:]).float().softmax(dim=1)

        return sliding_window_inference(
            view if parent_labels is None else torch.cat([view, parent_labels.to(view.dtype)], dim=1),
            roi_size=tuple(min(window, n) for n in view.shape[2:]),
            sw_batch_size=1,
            predictor=predict,
            overlap=0.25,
            mode="gaussian",
            progress=progress,
        )


def _moments(normalized: torch.Tensor, within: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each volume's values where `within` is 1, of shape (B, 1, 1, 1, 1)."""
    size = within.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)
    mean = (normalized * within).sum(dim=(2, 3, 4), keepdim=True) / size
    centred = (normalized - mean) * within
    return mean, (centred.square().sum(dim=(2, 3, 4), keepdim=True) / size).sqrt()


def _check_children(num_parts: int, parent: dict | None, children: Sequence[int] | None) -> None:
    if (parent is None) != (children is None):
        raise ValueError("`parent` and `children` go together: give both or neither.")
    if children is None:
        return
    if len(children) != parent["num_parts"] or min(children) < 1 or max(children) < 2 or sum(children) != num_parts:
        raise ValueError(
            f"`children` must be {parent['num_parts']} numbers of parts, one for each part of the parent, at least one "
            f"of them above 1, that sum to {num_parts}; got {tuple(children)}."
        )
