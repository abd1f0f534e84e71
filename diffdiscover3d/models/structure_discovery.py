"""The segmentation network f of the paper, which maps a volume to K soft parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from diffdiscover3d.data.foreground import Frame, find_foreground, robust_scale
from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor
from diffdiscover3d.data.transforms import min_max_normalize, moments_within, pad_to_multiple
from diffdiscover3d.models import cpu_kernels
from diffdiscover3d.models.brightness import add_brightness
from diffdiscover3d.models.config_schema import check_bright_part, check_children, check_scaling, check_spacing
from diffdiscover3d.models.cpu_kernels import Conv3d, precise_if_small
from diffdiscover3d.models.loading import StrictLoadingMixin
from diffdiscover3d.models.mixed_precision import free_memory
from diffdiscover3d.models.window_layout import activation_bytes, fits_window

_INPUT_RANGE = 4.0  # standard deviations


@dataclass
class StructureDiscoveryOutput(BaseOutput):
    """Output of [`StructureDiscoveryModel`].

    Attributes:
        logits: (B, K, H, W, D); their softmax over K gives the soft parts. The logits of a part are minus infinity
            outside its parent.
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
    """3D U-Net that segments a volume into K parts, largest first, or subdivides the parts of a coarser model.

    Args:
        num_parts: number of parts K.
        channels, strides: channels and strides of the MONAI U-Net; the defaults are the authors'.
        dropout: dropout probability.
        norm: "batch" (as in the authors' code) or "instance".
        window_size: side length of the sliding window, in voxels. Volumes of at most `window_size`³ voxels are
            processed in one pass.
        parent: configuration of the model whose parts are subdivided; `None` segments the whole volume. The parent is a
            frozen submodule and is saved with this model (not in the paper).
        children: number of parts into which each part of the parent is divided; 1 leaves it undivided. Sums to K.
        scaling: intensity scaling, "min_max" over the whole volume or "robust" by percentiles of the foreground (see
            [`robust_scale`]).
        frame: grid to which [`segment`] resamples the foreground box; outside it is part 0. Needs robust scaling.
        bright_part: the brighter of the two parts of a divided part; [`segment`] averages the soft parts of a volume
            and its mirror image, and adds [`add_brightness`] to the logit of this part.
        spacing, spacing_unit: target edge lengths of a voxel, as of [`WorkingGrid`]. The command resamples scans to it;
            the methods of this class take volumes as they are.

    Raises:
        ValueError: if an option is out of range, or `strides`, `children`, `scaling` or `frame` do not fit the others.

    Example:
        >>> coarse = StructureDiscoveryModel(num_parts=2)
        >>> fine = StructureDiscoveryModel.from_parent(coarse, children=(1, 3))
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
        scaling: str = "min_max",
        frame: Sequence[int] | None = None,
        bright_part: int | None = None,
        spacing: Sequence[float] | None = None,
        spacing_unit: str = "mm",
    ):
        super().__init__()
        if num_parts < 2:
            raise ValueError(f"`num_parts` must be at least 2, got {num_parts}.")
        check_children(num_parts, parent, children)
        check_scaling(scaling, frame, parent)
        check_bright_part(bright_part, frame, children)
        check_spacing(spacing, spacing_unit, frame, parent)
        if len(strides) != len(channels) - 1:
            raise ValueError(f"`strides` must have {len(channels) - 1} entries, one less than `channels`.")
        from monai.networks.nets import UNet  # slow import

        self.stride = int(torch.tensor(list(strides)).prod())
        outputs = num_parts if parent is None else sum(c for c in children if c > 1)
        network = UNet(3, 1, outputs, tuple(channels), tuple(strides), dropout=dropout, norm=norm)
        self.network = Conv3d.adopt(network)
        self.register_buffer("part_order", torch.arange(num_parts))
        self.parent_model = None if parent is None else StructureDiscoveryModel(**parent).requires_grad_(False).eval()

    @classmethod
    def from_parent(
        cls, parent: "StructureDiscoveryModel", children: Sequence[int], **config
    ) -> "StructureDiscoveryModel":
        """Create a model that subdivides the parts of a trained model; `config` as for the class.

        Scaling, frame and spacing default to the parent's.
        """
        settings = {k: v for k, v in parent.config.items() if not k.startswith("_")}
        config = {**{k: settings[k] for k in ("scaling", "frame", "spacing", "spacing_unit")}, **config}
        model = cls(num_parts=sum(children), parent=settings, children=tuple(children), **config)
        model.parent_model.load_state_dict(parent.state_dict())
        return model

    @property
    def parents(self) -> tuple[int, ...] | None:
        """For each part, the index of the enclosing part of the parent; `None` without a parent."""
        if self.parent_model is None:
            return None
        of_output = [part for part, count in enumerate(self.config.children) for _ in range(count)]
        return tuple(of_output[i] for i in self.part_order.tolist())

    @property
    def levels(self) -> tuple["StructureDiscoveryModel", ...]:
        """The models of all levels of the hierarchy, coarsest first; the last is this model."""
        return (*(self.parent_model.levels if self.parent_model is not None else ()), self)

    def train(self, mode: bool = True) -> "StructureDiscoveryModel":
        """Set the training mode; a parent stays in evaluation mode because it is frozen."""
        super().train(mode)
        if self.parent_model is not None:
            self.parent_model.eval()
        return self

    def forward(self, volume: torch.Tensor, parent_labels: torch.Tensor | None = None) -> StructureDiscoveryOutput:
        """Compute the logits of the parts.

        Args:
            volume: (B, 1, H, W, D) volumes of any size and intensity range; each is scaled. A network with a frame
                expects volumes that are already in their frames.
            parent_labels: (B, 1, H, W, D) precomputed part labels of the parent.

        Raises:
            InputError: if a volume has no contrast or contains NaN or Inf.
        """
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"`volume` must be (batch, 1, H, W, D), got shape {tuple(volume.shape)}.")
        scaled = self.scale(volume, check=not self.training)  # training volumes are checked in advance
        return StructureDiscoveryOutput(logits=self.scaled_logits(scaled, parent_labels))

    def scale(self, volume: torch.Tensor, check: bool = True) -> torch.Tensor:
        """Scale the intensities of (B, 1, H, W, D) volumes as the network expects them.

        Raises:
            InputError: if a volume has no contrast or contains NaN or Inf; only with `check`.
        """
        if self.config.scaling == "robust":
            return robust_scale(volume.float(), check=check)
        return min_max_normalize(volume.float(), check=check)

    def scaled_logits(self, scaled: torch.Tensor, parent_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the logits of the parts, (B, K, H, W, D), of volumes returned by [`scale`]."""
        if parent_labels is None:
            parent_labels = self._parent_labels(scaled)
        return self._logits(self._network_input(scaled, parent_labels), parent_labels)

    @torch.no_grad()
    def label_parents(self, volume: torch.Tensor) -> torch.Tensor | None:
        """Part labels of the parent, (B, 1, H, W, D), for volumes as in `forward`; `None` without a parent."""
        return self._parent_labels(self.scale(volume, check=not self.training))

    @torch.no_grad()
    def segment(self, volume, progress: bool = False, parent_labels: torch.Tensor | None = None) -> Segmentation:
        """Segment volumes of any size into parts.

        Args:
            volume: an array or tensor of shape (H, W, D), (B, H, W, D) or (B, 1, H, W, D) with any intensities, or
                another input accepted by [`as_volume_tensor`].
            progress: show a progress bar during sliding-window inference.
            parent_labels: (B, H, W, D) precomputed part labels of the parent; ignored by a network with a frame, which
                computes them in the frame.

        Raises:
            InputError: if a volume has no contrast or contains NaN or Inf.
        """
        volume = as_volume_tensor(volume)
        with evaluating(self):
            if self.config.frame is not None:
                probabilities = torch.cat([self._framed_probabilities(v[None].to(self.device)) for v in volume])
            else:
                known = None if parent_labels is None else parent_labels[:, None].to(self.device)
                probabilities = self._probabilities(self.scale(volume.to(self.device)), progress, known)
        dtype = torch.uint8 if self.config.num_parts <= 256 else torch.int32
        return Segmentation(labels=probabilities.max(dim=1).indices.to(dtype), probabilities=probabilities)

    @torch.no_grad()
    def segment_window(
        self,
        normalized: torch.Tensor,
        parent_labels: torch.Tensor | None = None,
        moments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the soft parts of one window, given statistics of the whole volume.

        Args:
            normalized: (B, 1, h, w, d) window of a volume normalised to [0, 1], with at most as many voxels as the
                network's window.
            parent_labels: (B, 1, h, w, d) part labels of the parent; `None` without a parent.
            moments: (parts of the parent, 2) mean and standard deviation of the normalised volume in each part of the
                parent; `None` without a parent.

        Returns:
            (B, K, h, w, d) float32, summing to 1 over K.
        """
        return (
            self._logits(self._network_input(normalized, parent_labels, moments), parent_labels).float().softmax(dim=1)
        )

    def order_parts(self, sizes: torch.Tensor) -> None:
        """Renumber the parts, largest first.

        Args:
            sizes: (K,) mean size of each part, in the current order.
        """
        order = torch.argsort(sizes.to(self.part_order.device), descending=True, stable=True)
        self.part_order.copy_(self.part_order[order])

    @torch.no_grad()
    def _parent_labels(self, normalized: torch.Tensor, progress: bool = False) -> torch.Tensor | None:
        if self.parent_model is None:
            return None
        # max is several times faster than argmax on a CPU
        return self.parent_model._probabilities(normalized, progress).max(dim=1, keepdim=True).indices

    def _network_input(
        self, normalized: torch.Tensor, parent_labels: torch.Tensor | None, moments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The input of the network: the volume or, with a parent, each divided part standardised separately.

        Without standardisation, the contrast between the parts of the parent would dominate the contrast within them.
        """
        if parent_labels is None:
            return normalized
        view = torch.zeros_like(normalized)
        for part, count in enumerate(self.config.children):
            if count > 1:
                within = (parent_labels == part).to(normalized.dtype)
                mean, spread = moments_within(normalized, within) if moments is None else moments[part]
                centred = (normalized - mean) * within
                view = view + (centred / spread.clamp(min=1e-6)).clamp(-_INPUT_RANGE, _INPUT_RANGE)
        return view

    def _logits(self, view: torch.Tensor, parent_labels: torch.Tensor | None) -> torch.Tensor:
        h, w, d = view.shape[2:]
        padded = pad_to_multiple(view, self.stride)
        if max(padded.shape[2:]) <= self.stride:  # the coarsest grid needs more than one voxel for the norm
            padded = pad_to_multiple(view, 2 * self.stride)
        with precise_if_small(padded, self.stride):
            logits = self.network(padded.to(next(self.network.parameters(), padded).dtype))[:, :, :h, :w, :d]
        if parent_labels is not None:
            logits = self._mask_outside_parents(logits, parent_labels)
        return logits[:, self.part_order]

    def _mask_outside_parents(self, logits: torch.Tensor, parent_labels: torch.Tensor) -> torch.Tensor:
        """Expand the network output to the logits of all K parts, minus infinity outside the parent of each part."""
        columns, used = [], 0
        for part, count in enumerate(self.config.children):
            within = parent_labels == part
            if count == 1:
                column = torch.zeros_like(logits[:, :1])
            else:
                column = logits[:, used : used + count]
                used += count
            columns.append(column.masked_fill(~within, -torch.inf))
        return torch.cat(columns, dim=1)

    def _probabilities(
        self, normalized: torch.Tensor, progress: bool = False, parent_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        window = self.config.window_size
        # computed on the whole volume, so that all windows use the same parent labels and intensity scale
        if parent_labels is None:
            parent_labels = self._parent_labels(normalized, progress)
        view = self._network_input(normalized, parent_labels)
        if fits_window(view.shape[2:], self.config):
            return self._logits(view, parent_labels).float().softmax(dim=1)
        from monai.inferers import sliding_window_inference

        def predict(x: torch.Tensor) -> torch.Tensor:
            return self._logits(x[:, :1], None if parent_labels is None else x[:, 1:]).float().softmax(dim=1)

        return sliding_window_inference(
            view if parent_labels is None else torch.cat([view, parent_labels.to(view.dtype)], dim=1),
            roi_size=tuple(min(window, n) for n in view.shape[2:]),
            sw_batch_size=self._windows_at_once(view),
            predictor=predict,
            overlap=0.25,
            mode="gaussian",
            progress=progress,
        )

    def _windows_at_once(self, view: torch.Tensor) -> int:
        """How many windows are computed together: one on a CPU, up to 8 that fit half of an accelerator's memory."""
        if cpu_kernels.is_on_cpu(view):
            return 1
        needed = activation_bytes(view.shape[2:], self.config.window_size, self.config)
        return int(min(8, max(1, free_memory(view.device) / 2 / needed)))

    def _framed_probabilities(self, volume: torch.Tensor) -> torch.Tensor:
        """Soft parts (1, K, H, W, D) of one volume, computed in the frame around its foreground."""
        foreground = find_foreground(volume)
        frame = Frame.around(foreground, self.config.frame)
        scaled = frame.crop(robust_scale(volume, foreground))
        soft, part = self._probabilities(scaled), self.config.bright_part
        if part is not None:
            soft = (soft + self._probabilities(scaled.flip(2)).flip(2)) / 2  # left and right alike, as in training
            (other,) = [k for k, parent in enumerate(self.parents) if parent == self.parents[part] and k != part]
            both = soft[:, [part, other]].clamp(min=1e-9)
            logit = (both[:, :1] / both[:, 1:]).log()
            share = add_brightness(logit, scaled, frame.crop(foreground.to(scaled.dtype)) > 0.5).sigmoid()
            total = soft[:, part] + soft[:, other]
            soft[:, part], soft[:, other] = total * share[:, 0], total * (1 - share[:, 0])
        return frame.paste(soft)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within the context a model is in evaluation mode; after it, also after an error, in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
