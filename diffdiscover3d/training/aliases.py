"""Names of training options in diffusers' example scripts, and the options of this package that they set.

The parser, config files, the messages about unknown options and the page "Coming from diffusers" all use this table.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Alias:
    """An option of diffusers' example scripts.

    Attributes:
        name: the option's name there, with underscores.
        field: the config field that it sets.
        note: the difference in meaning, if there is one.
        kind: type of the value; default: that of the field.
        convert: maps the value and all options given to values of config fields; default: the value is taken as is.
    """

    name: str
    field: str
    note: str = ""
    kind: type | None = None
    convert: Callable[[object, Mapping], dict] | None = None


def _batch_size(per_process: int, given: Mapping) -> dict:
    accumulated = given.get("gradient_accumulation_steps", 1)
    return {"batch_size": per_process * accumulated * int(os.environ.get("WORLD_SIZE", "1"))}


def _ema_decay(wanted: bool, given: Mapping) -> dict:
    return {} if wanted else {"ema_decay": 0.0}


def _resume(checkpoint: str, given: Mapping) -> dict:
    step = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
    if step and not Path(checkpoint).exists():
        checkpoint = f"{given.get('output_dir', 'outputs')}/checkpoints/checkpoint-{int(step[1]):08d}"
    return {"resume": checkpoint}


ALIASES = (
    Alias("dataset_name", "dataset"),
    Alias("train_data_dir", "dataset"),
    Alias("max_train_steps", "max_steps"),
    Alias(
        "train_batch_size",
        "batch_size",
        "volumes per process and micro-batch; `--batch-size` is the total over all processes and micro-batches",
        int,
        _batch_size,
    ),
    Alias("lr_scheduler", "lr_schedule"),
    Alias("allow_tf32", "tf32"),
    Alias("random_flip", "flips", "on by default, along all three axes"),
    Alias("dataloader_num_workers", "num_workers"),
    Alias("checkpointing_steps", "checkpoint_every"),
    Alias("checkpoints_total_limit", "keep_checkpoints", "2 by default"),
    Alias("validation_steps", "preview_every", "writes pictures into `previews/`"),
    Alias(
        "resume_from_checkpoint",
        "resume",
        "`latest`, a folder, or `checkpoint-N` for a checkpoint of the output folder",
        str,
        _resume,
    ),
    Alias("ddpm_num_steps", "num_train_timesteps"),
    Alias(
        "use_ema",
        "ema_decay",
        "the moving average is always computed and saved; `--no-use-ema` sets its decay to 0",
        bool,
        _ema_decay,
    ),
    Alias("ema_max_decay", "ema_decay"),
    Alias("pretrained_model_name_or_path", "teacher", "the diffusion model, which is not trained further"),
)

# options of diffusers' example scripts without an equivalent, and the reason
ABSENT = {
    "hub_token": "a token on the command line can be read by other users; log in with `hf auth login` or set HF_TOKEN",
    "num_processes": "`accelerate launch --num_processes N -m diffdiscover3d.train PHASE` starts several processes",
    "center_crop": "volumes are resampled as a whole; --crop crops those of BraTS",
    "scale_lr": "the learning rate is not scaled; set --learning-rate",
    "ddpm_beta_schedule": "the noise schedule is the cosine schedule of the paper",
    "enable_xformers_memory_efficient_attention": "the attention limits its memory by itself",
    "logging_dir": "logs are written into --output-dir",
    "cache_dir": "set HF_HOME or HF_HUB_CACHE",
    "revision": "download the model with `diffdiscover3d pull --revision`, and give its folder",
    "validation_epochs": "pictures are written by step; set --preview-every",
    "save_images_epochs": "pictures are written by step; set --preview-every",
    "save_model_epochs": "the model is saved at the end, checkpoints by step; set --checkpoint-every",
}
# options of the same name in diffusers' example scripts
SAME_NAMES = (
    "output_dir", "seed", "num_train_epochs", "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate",
    "lr_warmup_steps", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm", "mixed_precision", "prediction_type", "snr_gamma", "report_to", "push_to_hub", "hub_model_id",
    "hub_private_repo",
)  # fmt: skip


def aliases_of(kind: type) -> dict[str, Alias]:
    """The aliases that set a field of the config class `kind`, by name."""
    fields = {f.name for f in dataclasses.fields(kind)}
    return {alias.name: alias for alias in ALIASES if alias.field in fields}


def as_fields(kind: type, given: Mapping, everything: Mapping) -> dict:
    """Replace aliases among options by the fields of `kind` that they set.

    Args:
        given: options by field or alias name.
        everything: all options of the training, which conversions may depend on.

    Raises:
        ValueError: if an option and its alias have different values.
    """
    known, fields = aliases_of(kind), {}
    origin: dict[str, str] = {}
    for name, value in given.items():
        alias = known.get(name)
        if alias is None:
            found = {name: value}
        else:
            found = alias.convert(value, everything) if alias.convert else {alias.field: value}
        for field, new in found.items():
            if field in fields and fields[field] != new:
                raise ValueError(
                    f"`{name}` must be left out with `{origin[field]}`, which sets the same option, got {value!r}."
                )
            fields[field], origin[field] = new, name
    if "max_steps" in fields:
        fields.pop("num_train_epochs", None)  # as in diffusers, the number of steps takes precedence
    return fields


def explain_unknown(name: str, kind: type, others: Mapping[str, type] = {}) -> str:
    """The sentence about an option that `kind` does not have: the reason, or the most similar option.

    Args:
        name: the option's name; dashes and underscores are equivalent.
        others: further config classes by the name of their training, in which the option may exist.
    """
    name = name.strip("-").replace("-", "_")
    plain = name.removeprefix("no_")
    flag = "--" + name.replace("_", "-")
    if name in ABSENT:
        return f"{flag} is not an option: {ABSENT[name]}"
    owners = [phase for phase, other in others.items() if {plain} & _names(other)]
    if owners:
        return f"{flag} is not an option of this training, but of {' and '.join(owners)}"
    names = {n.replace("_", "-") for n in _names(kind)}
    close = difflib.get_close_matches(flag[2:], sorted(names), n=1, cutoff=0.6)
    return f"unknown option {flag}" + (f"; did you mean --{close[0]}?" if close else "")


def _names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} | set(aliases_of(kind))
