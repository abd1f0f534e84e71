"""Training options of both phases: validated frozen dataclasses, filled from presets, config files and the CLI."""

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.data.formats.units import SPACING_UNITS
from diffdiscover3d.training.aliases import as_fields
from diffdiscover3d.training.brats_config import BraTSConfig
from diffdiscover3d.training.options import added, option, read_options, require
from diffdiscover3d.training.reading_config import ReadingConfig

# all but one_cycle are those of diffusers' `get_scheduler`
SCHEDULES = (
    "constant", "one_cycle", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
)  # fmt: skip
PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")
PRECISIONS = ("auto", "no", "bf16", "fp16")
HUB_STRATEGIES = ("end", "every_save")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
SAVE_DTYPES = ("float32", "bfloat16", "float16")
INCLUSIONS = ("compact", "alike", "auto")
_CONSISTENCY, _ASSIGNMENT = (f"; only with --objective {name}" for name in ("consistency", "assignment"))
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "aim", "swanlab", "dvclive")


@dataclass(frozen=True)
class TrainingConfig(BraTSConfig, ReadingConfig):
    """Options common to both phases. Every field is an option of `python -m diffdiscover3d.train`."""

    dataset: str = option("synthetic-regular", "a named dataset, or a folder, glob or text list of NIfTI volumes")
    output_dir: str = option("outputs", "folder for the trained model, checkpoints, preview images and logs")
    max_steps: int = option(50_000, "number of optimiser steps")
    num_train_epochs: int | None = added(None, "passes over the training volumes, in place of --max-steps")
    batch_size: int = option(4, "volumes per optimiser step, in total over all processes and accumulation steps")
    gradient_accumulation_steps: int = option(1, "micro-batches accumulated per optimiser step")
    learning_rate: float = option(1e-4, "learning rate of Adam; the maximum of a one_cycle schedule")
    lr_schedule: str = option("constant", "learning rate schedule", SCHEDULES)
    lr_warmup_steps: int | None = added(None, "steps of linear warm-up (default: 10 % of a one_cycle schedule, else 0)")
    adam_beta1: float = added(0.9, "decay of Adam's first moment")
    adam_beta2: float = added(0.999, "decay of Adam's second moment")
    adam_epsilon: float = added(1e-8, "epsilon of Adam")
    adam_weight_decay: float = added(0.0, "decoupled weight decay; above 0 the optimiser is AdamW")
    use_8bit_adam: bool = added(False, "keep Adam's moments in 8 bits: a CUDA GPU and the extra `bitsandbytes`")
    max_grad_norm: float = option(1.0, "maximum gradient norm for clipping; 0 disables clipping")
    mixed_precision: str = option(
        "auto",
        "precision of the forward pass; auto: as set by the launcher, otherwise bf16 if it is measurably faster",
        PRECISIONS,
    )
    memory_format: str = option(
        "auto", "memory format of weights and volumes; auto: measure and use the faster", MEMORY_FORMATS
    )
    compile: bool = option(False, "compile the networks with torch.compile: slower start, faster steps")
    cuda_graphs: bool | None = option(
        None, "replay steps as CUDA graphs (default: wherever possible, see the tutorial on training)"
    )
    tf32: bool = option(False, "compute float32 matrix products on a GPU in TF32, with 10 bits of mantissa")
    volume_size: tuple[int, ...] | None = option(None, "resample all volumes to this grid (one or three integers)")
    spacing: tuple[float, ...] | None = added(
        None, "voxel size to which volumes of files are resampled (1 or 3 numbers)"
    )
    spacing_unit: str = added("mm", "unit of --spacing: mm, or voxel for multiples of a file's voxels", SPACING_UNITS)
    flips: bool = option(True, "randomly flip volumes along each axis")
    num_workers: int = option(0, "data-loading workers per training process")
    seed: int = option(0, "random seed of weights, data order, noise and augmentation")
    log_every: int = option(50, "steps between log lines")
    checkpoint_every: int = option(500, "steps between checkpoints")
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep")
    preview_every: int = option(500, "steps between preview images; 0 disables them")
    resume: str | None = option(None, "checkpoint folder to resume from, or `latest`")
    report_to: str | None = option(
        None, f"experiment trackers, separated by commas: {', '.join(TRACKERS)}, or all that are installed"
    )
    push_to_hub: bool = added(
        False, "push the trained model with its card to the Hub; the token is that of `hf auth login` or HF_TOKEN"
    )
    hub_model_id: str | None = added(None, "repository to push to (default: the name of the output folder)")
    hub_private_repo: bool = added(False, "make a new repository private")
    hub_strategy: str = added(
        "end", "when to push: at the end, or every_save: also the model of each checkpoint", HUB_STRATEGIES
    )
    save_dtype: str = option("float32", "data type of the saved weights", SAVE_DTYPES)

    extendable: typing.ClassVar[bool] = True  # whether a finished training may be resumed with more steps

    def __post_init__(self):
        super().__post_init__()
        for name in ("volume_size", "spacing"):
            value = getattr(self, name)
            if value is not None:
                value = tuple(value) if isinstance(value, tuple | list) else (value,)
                object.__setattr__(self, name, value * 3 if len(value) == 1 else value)
        edges = self.spacing
        require(not edges or (len(edges) == 3 and min(edges) > 0), "spacing", "one or three positive numbers", edges)
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("keep_checkpoints", "num_workers", "preview_every", "max_grad_norm", "seed"):
            least = 1 if name == "keep_checkpoints" else 0
            require(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        require(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            may_be_none = f.default is None
            require(
                choices is None or value in choices or (value is None and may_be_none),
                f.name,
                f"one of {choices}",
                value,
            )
        size = self.volume_size
        require(size is None or (len(size) == 3 and min(size) > 1), "volume_size", "one or three integers > 1", size)
        self._check_optimiser()
        for name in self.trackers:
            known = ("all", *TRACKERS)
            require(name in known, "report_to", f"one or more of {', '.join(known)}, separated by commas", name)
        for name in ("hub_model_id", "hub_private_repo"):
            require(
                self.push_to_hub or not getattr(self, name), name, "left out without --push-to-hub", getattr(self, name)
            )

    def _check_optimiser(self) -> None:
        epochs, warmup = self.num_train_epochs, self.lr_warmup_steps
        require(epochs is None or epochs >= 1, "num_train_epochs", "at least 1", epochs)
        require(warmup is None or warmup >= 0, "lr_warmup_steps", "at least 0", warmup)
        rule = "0 with the constant schedule; use --lr-schedule constant_with_warmup"
        require(not (warmup and self.lr_schedule == "constant"), "lr_warmup_steps", rule, warmup)
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(self.adam_epsilon > 0, "adam_epsilon", "positive", self.adam_epsilon)
        require(self.adam_weight_decay >= 0, "adam_weight_decay", "at least 0", self.adam_weight_decay)
        rule = "contiguous or auto with --use-8bit-adam"
        require(not self.use_8bit_adam or self.memory_format != "channels_last", "memory_format", rule, "channels_last")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `report_to`."""
        names = [name.strip() for name in (self.report_to or "").split(",")]
        return tuple(dict.fromkeys(name for name in names if name not in ("", "none")))


@dataclass(frozen=True)
class DiffusionConfig(TrainingConfig):
    """Options of diffusion pretraining. The defaults are the paper's, but for 50,000 steps instead of 50k epochs.

    Flips, the moving average of the weights and gradient clipping are not in the paper.
    """

    num_train_timesteps: int = option(250, "length T of the noise schedule")
    ema_decay: float = option(0.9999, "decay of the moving average of the weights, which is the saved model")
    width: int | None = option(None, "channels of the UNet at full resolution (default: from the preset)")
    sample_size: tuple[int, ...] | None = option(
        None, "internal grid of the UNet, one or three integers (default: from the preset)"
    )
    pad: bool = option(False, "pad volumes to the stride instead of resizing them to the internal grid")
    prediction_type: str = added(
        "sample",
        "what the UNet predicts: the clean volume (as in the paper), the noise, or the velocity",
        PREDICTION_TYPES,
    )
    loss_type: str = added("l1", "distance to what is predicted: absolute (as in the paper) or squared", ("l1", "l2"))
    snr_gamma: float | None = added(None, "gamma of the min-SNR weights of the loss, 5 is common (default: no weights)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to reduce memory")
    preset: str = option("paper", "preset of the UNet and of the option defaults", ("paper", "small", "brats"))

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.sample_size, int):
            object.__setattr__(self, "sample_size", (self.sample_size,))
        size = self.sample_size
        require(size is None or len(size) in (1, 3), "sample_size", "one or three integers", size)
        steps = self.num_train_timesteps  # the limits of a saved model, see models/config_schema.py
        require(2 <= steps <= 100_000, "num_train_timesteps", "in 2..100000", steps)
        require(not (self.pad and self.sample_size), "sample_size", "left out with --pad", self.sample_size)
        require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        require(self.snr_gamma is None or self.snr_gamma > 0, "snr_gamma", "positive", self.snr_gamma)


@dataclass(frozen=True)
class DiscoveryConfig(TrainingConfig):
    """Options of structure discovery. The defaults are those of the paper; the loss terms are Eq. 4 to 8.

    Batch size, dropout, flips and gradient clipping of this phase are not in the paper.
    """

    max_steps: int = option(2_000, "number of optimiser steps (paper: 100 epochs; here of 80 volumes in batches of 4)")
    learning_rate: float = option(3e-4, "learning rate of Adam; the maximum of a one_cycle schedule")
    teacher: str = option("", "folder or Hub id of the diffusion model, or the name of an embedded model")
    init_from: str | None = option(None, "folder or Hub id of a discovery network that provides the initial weights")
    init_seed: int | None = option(None, "seed of the initial weights alone (default: --seed)")
    num_parts: int = option(2, "number K of parts to discover")
    stages: tuple[int, ...] = option((1,), "decoder stages of the feature consistency, 1 the coarsest" + _CONSISTENCY)
    timestep: int = option(25, "timestep t of the noise added to the volumes for the teacher" + _CONSISTENCY)
    num_noise: int = option(1, "noise samples of the mean features and clean prediction of the teacher" + _CONSISTENCY)
    lambda_feature: float = option(1.0, "weight of the feature consistency, Eq. 6" + _CONSISTENCY)
    lambda_visual: float = option(1.0, "weight of the visual consistency, Eq. 7" + _CONSISTENCY)
    lambda_invariance: float = option(1.0, "weight of the photometric invariance, Eq. 8" + _CONSISTENCY)
    lambda_denoised: float = option(
        0.0, "weight of the consistency of the teacher's clean prediction (not in the paper)" + _CONSISTENCY
    )
    denoised_timesteps: tuple[int, ...] = option((60,), "timesteps over which the clean prediction is averaged")
    teacher_noise: str = option(
        "fresh", "teacher's noise: fresh at every step, or fixed per volume (faster)" + _CONSISTENCY, ("fresh", "fixed")
    )
    parent: str | None = option(
        None, "folder or Hub id of a discovery network whose parts are subdivided (not in the paper)"
    )
    children: tuple[int, ...] | None = option(
        None,
        "number of parts for each part of --parent (default: chosen automatically, half stay undivided)",
    )
    gamma_range: tuple[float, ...] = option((0.9, 1.1), "range of the gamma exponent of the photometric change")
    invert_probability: float = option(
        0.0, "probability that the photometric change also inverts the intensities (not in the paper)"
    )
    objective: str = option(
        "consistency",
        "what is minimised: the consistencies of Eq. 4, or the distance to parts that are assigned before the first "
        "step, by --init-from or by clustering in space (not in the paper)",
        ("consistency", "assignment"),
    )
    assign_from: str = option(
        "auto",
        "where assignments come from; auto: --init-from, or else clusters; labels: the true labels of synthetic cells, "
        "for a supervised ceiling" + _ASSIGNMENT,
        ("auto", "labels"),
    )
    reliable_share: float = option(0.5, "share of the volumes to train on, the most reliable ones" + _ASSIGNMENT)
    reliability: str = added(
        "contrast",
        "by which assignments from clusters are ranked: contrast of the inclusions, or separation: contrast with all "
        "that an inclusion touches, times its compactness" + _ASSIGNMENT,
        ("contrast", "separation"),
    )
    recolor_probability: float = option(0.75, "probability that assigned parts get new mean intensities" + _ASSIGNMENT)
    sibling_order: str = option(
        "auto",
        "number of an assigned inclusion: its rank by size, or free, as the network numbers it in each volume; auto: "
        "free where inclusions are alike" + _ASSIGNMENT,
        ("auto", "size", "free"),
    )
    inclusions: str = option(
        "compact", "a part is a compact inclusion, or all that are alike; auto: by the pieces" + _ASSIGNMENT, INCLUSIONS
    )
    potts_strength: float = option(0.6, "attraction of neighbouring voxels in assigned clusters" + _ASSIGNMENT)
    lambda_spatial: float = option(0.0, "weight of the spatial consistency of inclusions (not in the paper)")
    lambda_smooth: float = option(0.0, "weight of the smoothness of the parts (not in the paper)")
    relative_consistency: bool = option(False, "divide consistencies by the total variance" + _CONSISTENCY)
    norm: str = option("batch", "normalisation layers of the segmentation network", ("batch", "instance"))
    dropout: float = option(0.2, "dropout probability of the segmentation network")
    selection: str = option("confidence", "epoch that is saved: the most confident or the last", ("confidence", "last"))
    preset: str = option("paper", "preset of the option defaults", ("paper", "small", "brats"))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "gamma_range", tuple(self.gamma_range))
        object.__setattr__(self, "denoised_timesteps", tuple(self.denoised_timesteps))
        if self.children is not None:
            object.__setattr__(self, "children", tuple(self.children))
        require(2 <= self.num_parts <= 65_536, "num_parts", "in 2..65536", self.num_parts)
        require(len(self.stages) >= 1 and min(self.stages) >= 1, "stages", "one or more of 1, 2, ...", self.stages)
        require(self.timestep >= 0, "timestep", "at least 0", self.timestep)
        require(self.num_noise >= 1, "num_noise", "at least 1", self.num_noise)
        weights = ("lambda_feature", "lambda_visual", "lambda_invariance", "lambda_denoised")
        for name in (*weights, "lambda_spatial", "lambda_smooth", "potts_strength"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(any(getattr(self, name) for name in weights), "lambda_feature", "positive if all others are 0", 0)
        for name in ("invert_probability", "recolor_probability"):
            require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        require(0 < self.reliable_share <= 1, "reliable_share", "in (0, 1]", self.reliable_share)
        denoised = self.denoised_timesteps
        require(len(denoised) >= 1 and min(denoised) >= 0, "denoised_timesteps", "one or more of 0, 1, ...", denoised)
        rule = "left out with --objective assignment, which trains on some of the volumes; give --max-steps"
        assigned = self.objective == "assignment"
        require(not (assigned and self.num_train_epochs), "num_train_epochs", rule, self.num_train_epochs)
        require(self.children is None or self.parent, "children", "left out without --parent", self.children)
        # the parent is part of the initial network, so --parent would be ignored
        require(not (self.parent and self.init_from), "parent", "left out with --init-from", self.parent)
        gamma = self.gamma_range
        require(
            len(gamma) == 2 and 0 < gamma[0] <= gamma[1],
            "gamma_range",
            "two positive numbers in ascending order",
            gamma,
        )


# Differences of each preset from the defaults above. `small` was tuned on two CPU cores.
PRESETS: dict[type, dict[str, dict]] = {
    DiffusionConfig: {
        "paper": {},
        "small": {
            "max_steps": 2_500,
            "learning_rate": 8e-4,
            "lr_schedule": "one_cycle",
            "ema_decay": 0.995,
        },
        # with 64 channels on 128^3, a batch of 4 requires recomputing activations
        "brats": {"gradient_checkpointing": True},
    },
    DiscoveryConfig: {
        "paper": {},
        "small": {
            "max_steps": 1_200,
            "batch_size": 1,  # on a CPU, doubling the steps helps more than doubling the batch
            "norm": "instance",  # batch norm fails in evaluation mode when trained with one volume per batch
            "learning_rate": 1e-3,
            "lr_schedule": "one_cycle",
            "relative_consistency": True,
            "lambda_denoised": 1.0,
            "invert_probability": 0.5,
        },
        # background, brain and tumour from decoder stage 2; 100 epochs of 180 volumes in batches of 4
        "brats": {"num_parts": 3, "stages": (2,), "max_steps": 4_500},
    },
}


def make_config(kind: type, *, file: str | Path | None = None, **options):
    """Create a config of `kind` from its preset, a JSON or YAML file and `options`, in ascending order of precedence.

    Raises:
        InputError: if the file is missing, is not a mapping, or contains an unknown option.
        ValueError: if the value of an option is invalid.
    """
    chosen = read_options(kind, file, options) if file else {}
    given = as_fields(kind, options, {**chosen, **options})
    if "max_steps" in given:
        chosen.pop("num_train_epochs", None)
    chosen |= given
    preset = chosen.get("preset", kind.preset)
    if preset not in PRESETS[kind]:
        raise ValueError(f"`preset` must be one of {tuple(PRESETS[kind])}, got {preset!r}.")
    return kind(**{**PRESETS[kind][preset], **chosen})


def as_dict(config: TrainingConfig) -> dict:
    """The options as JSON values, without those added later that have their default."""
    left_out = {
        f.name
        for f in dataclasses.fields(config)
        if not f.metadata.get("record_default", True) and getattr(config, f.name) == f.default
    }
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    return json.loads(json.dumps(values))
