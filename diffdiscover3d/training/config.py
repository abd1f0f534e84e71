"""Training options of both phases: validated frozen dataclasses, filled from presets, config files and the CLI."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from diffdiscover3d.data.working_grid import SPACING_UNITS
from diffdiscover3d.errors import InputError

SCHEDULES = ("constant", "one_cycle")
PRECISIONS = ("auto", "no", "bf16", "fp16")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
SAVE_DTYPES = ("float32", "bfloat16", "float16")
INCLUSIONS = ("compact", "alike", "auto")
TRACKERS = ("tensorboard", "wandb", "trackio")


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainingConfig:
    """Options common to both phases. Every field is an option of `python -m diffdiscover3d.train`."""

    dataset: str = option("synthetic-regular", "a named dataset, or a folder, glob or text list of NIfTI volumes")
    output_dir: str = option("outputs", "folder for the trained model, checkpoints, preview images and logs")
    max_steps: int = option(50_000, "number of optimiser steps")
    batch_size: int = option(4, "volumes per optimiser step, in total over all processes and accumulation steps")
    gradient_accumulation_steps: int = option(1, "micro-batches accumulated per optimiser step")
    learning_rate: float = option(1e-4, "learning rate of Adam; the maximum of a one_cycle schedule")
    lr_schedule: str = option("constant", "learning rate schedule", SCHEDULES)
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
    cuda_graphs: bool = option(False, "replay each step as a CUDA graph: one GPU, one micro-batch per step")
    tf32: bool = option(False, "compute float32 matrix products on a GPU in TF32, with 10 bits of mantissa")
    volume_size: tuple[int, ...] | None = option(None, "resample all volumes to this grid (one or three integers)")
    spacing: tuple[float, ...] | None = option(
        None, "voxel size to which volumes of files are resampled (1 or 3 numbers)"
    )
    spacing_unit: str = option("mm", "unit of --spacing: mm, or voxel for multiples of a file's voxels", SPACING_UNITS)
    modality: str | None = option(None, "BraTS modality: flair (default), t1, t1ce or t2")
    grade: str | None = option(None, "grade of BraTS 2017 to 2019: HGG (default), LGG or all", ("HGG", "LGG", "all"))
    crop: tuple[int, ...] | None = option(None, "central crop of BraTS volumes, three integers (default: 200 200 155)")
    clip_percentiles: tuple[float, ...] | None = option(
        None, "clip BraTS intensities to these two percentiles of the tissue (default: no clipping)"
    )
    flips: bool = option(True, "randomly flip volumes along each axis")
    num_workers: int = option(0, "data-loading workers per training process")
    seed: int = option(0, "random seed of weights, data order, noise and augmentation")
    log_every: int = option(50, "steps between log lines")
    checkpoint_every: int = option(500, "steps between checkpoints")
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep")
    preview_every: int = option(500, "steps between preview images; 0 disables them")
    resume: str | None = option(None, "checkpoint folder to resume from, or `latest`")
    report_to: str | None = option(None, "experiment tracker", TRACKERS)
    save_dtype: str = option("float32", "data type of the saved weights", SAVE_DTYPES)

    def __post_init__(self):
        for name in ("volume_size", "spacing"):
            value = getattr(self, name)
            if value is not None:
                value = tuple(value) if isinstance(value, tuple | list) else (value,)
                object.__setattr__(self, name, value * 3 if len(value) == 1 else value)
        edges = self.spacing
        _require(not edges or (len(edges) == 3 and min(edges) > 0), "spacing", "one or three positive numbers", edges)
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("keep_checkpoints", "num_workers", "preview_every", "max_grad_norm", "seed"):
            least = 1 if name == "keep_checkpoints" else 0
            _require(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        _require(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            may_be_none = f.default is None
            _require(
                choices is None or value in choices or (value is None and may_be_none),
                f.name,
                f"one of {choices}",
                value,
            )
        for name in ("crop", "clip_percentiles"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        size = self.volume_size
        _require(size is None or (len(size) == 3 and min(size) > 1), "volume_size", "one or three integers > 1", size)


@dataclass(frozen=True)
class DiffusionConfig(TrainingConfig):
    """Options of diffusion pretraining. The defaults are those of the paper."""

    num_train_timesteps: int = option(250, "length T of the noise schedule")
    ema_decay: float = option(0.9999, "decay of the moving average of the weights, which is the saved model")
    width: int | None = option(None, "channels of the UNet at full resolution (default: from the preset)")
    sample_size: tuple[int, ...] | None = option(
        None, "internal grid of the UNet, one or three integers (default: from the preset)"
    )
    pad: bool = option(False, "pad volumes to the stride instead of resizing them to the internal grid")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to reduce memory")
    preset: str = option("paper", "preset of the UNet and of the option defaults", ("paper", "small", "brats"))

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.sample_size, int):
            object.__setattr__(self, "sample_size", (self.sample_size,))
        size = self.sample_size
        _require(size is None or len(size) in (1, 3), "sample_size", "one or three integers", size)
        _require(self.num_train_timesteps >= 2, "num_train_timesteps", "at least 2", self.num_train_timesteps)
        _require(not (self.pad and self.sample_size), "sample_size", "left out with --pad", self.sample_size)
        _require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)


@dataclass(frozen=True)
class DiscoveryConfig(TrainingConfig):
    """Options of structure discovery. The defaults are those of the paper; the loss terms are Eq. 4 to 8."""

    max_steps: int = option(2_000, "number of optimiser steps (paper: 100 epochs of 80 volumes in batches of 4)")
    learning_rate: float = option(3e-4, "learning rate of Adam; the maximum of a one_cycle schedule")
    teacher: str = option("", "folder or Hub id of the diffusion model, or the name of an embedded model")
    init_from: str | None = option(None, "folder or Hub id of a discovery network that provides the initial weights")
    init_seed: int | None = option(None, "seed of the initial weights alone (default: --seed)")
    num_parts: int = option(2, "number K of parts to discover")
    stages: tuple[int, ...] = option((1,), "decoder stages of the feature consistency; 1 is the coarsest")
    timestep: int = option(25, "timestep t of the noise added to the volumes for the teacher")
    num_noise: int = option(1, "noise samples over which the teacher's features are averaged")
    lambda_feature: float = option(1.0, "weight of the feature consistency, Eq. 6")
    lambda_visual: float = option(1.0, "weight of the visual consistency, Eq. 7")
    lambda_invariance: float = option(1.0, "weight of the photometric invariance, Eq. 8")
    lambda_denoised: float = option(
        0.0, "weight of the consistency of the teacher's clean prediction (not in the paper)"
    )
    denoised_timesteps: tuple[int, ...] = option((60,), "timesteps over which the clean prediction is averaged")
    teacher_noise: str = option(
        "fresh",
        "sample the teacher's noise at every step or once per volume (faster)",
        ("fresh", "fixed"),
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
        "for a supervised ceiling",
        ("auto", "labels"),
    )
    reliable_share: float = option(0.5, "share of the volumes to train on, those with the most reliable assignments")
    recolor_probability: float = option(0.75, "probability that assigned parts are given other mean intensities")
    sibling_order: str = option(
        "size",
        "number of an assigned inclusion: its rank by size, or free, as the network numbers it in each volume",
        ("size", "free"),
    )
    inclusions: str = option(
        "compact", "a part is a compact inclusion, or all that are alike; auto: by the pieces found", INCLUSIONS
    )
    potts_strength: float = option(0.6, "attraction of neighbouring voxels where clusters are assigned; 0: none")
    lambda_spatial: float = option(0.0, "weight of the spatial consistency of inclusions (not in the paper)")
    lambda_smooth: float = option(0.0, "weight of the smoothness of the parts (not in the paper)")
    relative_consistency: bool = option(False, "divide each consistency by the total variance of its representation")
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
        _require(self.num_parts >= 2, "num_parts", "at least 2", self.num_parts)
        _require(len(self.stages) >= 1 and min(self.stages) >= 1, "stages", "one or more of 1, 2, ...", self.stages)
        _require(self.timestep >= 0, "timestep", "at least 0", self.timestep)
        _require(self.num_noise >= 1, "num_noise", "at least 1", self.num_noise)
        weights = ("lambda_feature", "lambda_visual", "lambda_invariance", "lambda_denoised")
        for name in (*weights, "lambda_spatial", "lambda_smooth", "potts_strength"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(any(getattr(self, name) for name in weights), "lambda_feature", "positive if all others are 0", 0)
        for name in ("invert_probability", "recolor_probability"):
            _require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        _require(0 < self.reliable_share <= 1, "reliable_share", "in (0, 1]", self.reliable_share)
        denoised = self.denoised_timesteps
        _require(len(denoised) >= 1 and min(denoised) >= 0, "denoised_timesteps", "one or more of 0, 1, ...", denoised)
        _require(self.children is None or self.parent, "children", "left out without --parent", self.children)
        # the parent is part of the initial network, so --parent would be ignored
        _require(not (self.parent and self.init_from), "parent", "left out with --init-from", self.parent)
        gamma = self.gamma_range
        _require(
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
    from_file = read_options(kind, file) if file else {}
    chosen = {**from_file, **options}
    preset = chosen.get("preset", kind.preset)
    if preset not in PRESETS[kind]:
        raise ValueError(f"`preset` must be one of {tuple(PRESETS[kind])}, got {preset!r}.")
    return kind(**{**PRESETS[kind][preset], **chosen})


def read_options(kind: type, file: str | Path) -> dict:
    """Read option values from a JSON or YAML file; dashes and underscores in option names are equivalent."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the config file ({error}).") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); a YAML file must end in .yaml or .yml.") from error
    except Exception as error:  # yaml is imported only for YAML files, so its error class may be undefined
        raise InputError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a config file must map option names to values, got {type(values).__name__}.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{path}: unknown options {unknown}; valid options are {sorted(known)}.")
    hints = typing.get_type_hints(kind)
    return {key: _as_type(path, key, value, hints[key]) for key, value in values.items()}


def _as_type(path: Path, key: str, value, hint):
    """Convert a value of a config file to the type of its option; YAML parses 1e-4 as a string and 1 as an integer."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    try:
        if typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            return tuple(_as_type(path, key, v, item) for v in (value if isinstance(value, list) else [value]))
        right = (bool, int, float) if hint is float else hint
        if hint in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
            if hint(value) == float(value):
                return hint(value)
        elif isinstance(value, right):
            return value
    except ValueError:
        pass
    raise InputError(f"{path}: `{key}` must be of type {hint.__name__}, got {value!r}.")


def add_options(parser, kind: type) -> None:
    """Add one option per field of `kind` to an `argparse` parser; options not given are absent from the namespace."""
    import argparse

    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        flag, hint, help_text = "--" + f.name.replace("_", "-"), hints[f.name], f.metadata["help"]
        arguments = {"dest": f.name, "default": argparse.SUPPRESS}
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if isinstance(hint, types.UnionType):
            hint = inner[0]
        shown = "none" if f.default in (None, "") else f.default
        arguments["help"] = f"{help_text} (default: {shown})"
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            arguments |= {"type": typing.get_args(hint)[0], "nargs": "+"}
        else:
            arguments |= {"type": hint, "choices": f.metadata["choices"]}
        parser.add_argument(flag, **arguments)


def as_dict(config: TrainingConfig) -> dict:
    """The options as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _require(holds: bool, name: str, rule: str, value) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
