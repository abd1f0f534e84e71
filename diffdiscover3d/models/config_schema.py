"""Validation of model configurations before anything is built from them.

A configuration may come from the Hub: wrong types, absurd sizes and deep nesting must be errors, not crashes or minutes
of allocation. The module imports no torch, since commands check a configuration before they load a model.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffdiscover3d.data.formats.units import SPACING_UNITS
from diffdiscover3d.errors import ModelError
from diffdiscover3d.utils.files import read_json

SCALINGS = ("min_max", "robust")
_MAX_BYTES = 2**20  # of a configuration file
_MAX_DEPTH = 8  # levels of a nested discovery model
_MAX_PARAMETERS = 2**31
Rule = Callable[[object], str | None]  # returns what is expected instead, or `None` if the value is valid


def integer(low: int, high: int) -> Rule:
    """An integer in [low, high]."""

    def check(value):
        valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if valid else f"an integer in {low}..{high}"

    return check


def number(low: float, high: float) -> Rule:
    """A finite number in [low, high]."""

    def check(value):
        valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if valid else f"a number in {low}..{high}"

    return check


def one_of(*choices) -> Rule:
    """One of the choices; of the same type, so that 1 does not pass for `True`."""

    def check(value):
        valid = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if valid else f"one of {choices}"

    return check


def sequence(rule: Rule, shortest: int, longest: int) -> Rule:
    """A list whose entries fulfil a rule."""

    def check(value):
        wrong = f"a list of {shortest} to {longest} entries"
        if not isinstance(value, list | tuple) or not shortest <= len(value) <= longest:
            return wrong
        problems = [expected for entry in value if (expected := rule(entry))]
        return f"{wrong}, each {problems[0]}" if problems else None

    return check


def optional(rule: Rule) -> Rule:
    """`None`, or a value that fulfils a rule."""

    def check(value):
        expected = None if value is None else rule(value)
        return expected and f"null or {expected}"

    return check


def either(*rules: Rule) -> Rule:
    """A value that fulfils one of several rules."""

    def check(value):
        expected = [rule(value) for rule in rules]
        return None if None in expected else " or ".join(expected)

    return check


def mapping(value) -> str | None:
    """A JSON object."""
    return None if isinstance(value, Mapping) else "a JSON object"


_GRID = integer(1, 4096)
_FLAG = one_of(True, False)
_SCHEDULER: dict[str, Rule] = {
    "num_train_timesteps": integer(1, 100_000),
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
    "trained_betas": optional(sequence(number(0, 1), 1, 100_000)),
    "prediction_type": one_of("sample", "epsilon", "v_prediction"),
    "clip_sample": _FLAG,
    "clip_sample_range": number(0, 1e6),
    "thresholding": _FLAG,
    "rescale_betas_zero_snr": _FLAG,
    "steps_offset": integer(0, 100_000),
    "timestep_spacing": one_of("leading", "linspace", "trailing"),
    "dynamic_thresholding_ratio": number(0, 1),
    "sample_max_value": number(0, 1e6),
}
_OTHER_SCHEDULER = "other scheduler of diffusers"
SCHEMAS: dict[str, dict[str, Rule]] = {
    "StructureDiscoveryModel": {
        "num_parts": integer(2, 65_536),
        "channels": sequence(integer(1, 4096), 2, 12),
        "strides": sequence(integer(1, 8), 1, 11),
        "dropout": number(0, 0.999),
        "norm": one_of("batch", "instance"),
        "window_size": integer(8, 4096),
        "parent": optional(mapping),
        "children": optional(sequence(integer(1, 65_536), 2, 65_536)),
        "scaling": one_of(*SCALINGS),
        "frame": optional(sequence(integer(8, 1024), 3, 3)),
        "bright_part": optional(integer(0, 65_535)),
        "spacing": optional(sequence(number(1e-9, 1e6), 3, 3)),
        "spacing_unit": one_of(*SPACING_UNITS),
    },
    "UNet3DModel": {
        "in_channels": integer(1, 64),
        "out_channels": integer(1, 64),
        "width": integer(4, 4096),
        "channel_multipliers": sequence(integer(1, 64), 2, 8),
        "blocks_per_level": integer(1, 16),
        "attention": sequence(one_of(None, "linear", "full"), 2, 8),
        "attention_heads": integer(1, 64),
        "attention_head_dim": integer(1, 1024),
        "norm_groups": integer(1, 1024),
        "sample_size": optional(either(_GRID, sequence(_GRID, 3, 3))),
        "resize_before_noise": _FLAG,
    },
    _OTHER_SCHEDULER: _SCHEDULER,
    "DDPMScheduler": {**_SCHEDULER, "variance_type": one_of("fixed_small", "fixed_small_log", "fixed_large")},
    "DDIMScheduler": {**_SCHEDULER, "set_alpha_to_one": _FLAG},
}


def read_config(path: str | Path, kind: str | None = None) -> dict:
    """Read and validate the configuration file of a model or scheduler.

    Args:
        path: `config.json` or `scheduler_config.json`.
        kind: the class it is for; default: the `_class_name` in the file.

    Raises:
        ModelError: if the file cannot be read, or [`validate_config`] refuses it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(
                f"{path}: a configuration has at most {_MAX_BYTES} bytes, this file {path.stat().st_size}."
            )
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a configuration ({error}); fetch the model again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(config).__name__}.")
    kind = kind or config.get("_class_name")
    if isinstance(kind, str) and kind not in SCHEMAS and kind.endswith("Scheduler"):
        kind = _OTHER_SCHEDULER  # whether it is a class of diffusers is checked when the pipeline is loaded
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise ModelError(f"{path}: is of class {kind!r}, not one of {', '.join(SCHEMAS)}.")
    validate_config(config, kind, path)
    return config


def validate_config(config: Mapping, kind: str, source: str | Path = "configuration") -> None:
    """Check types and ranges of the known entries of a configuration; missing ones keep their defaults.

    Args:
        config: as stored in JSON.
        kind: name of the class, a key of `SCHEMAS`.
        source: named in errors.

    Raises:
        ModelError: naming the entry, its value and what is expected.
    """
    depth, nested = 0, config
    while isinstance(nested, Mapping):
        depth += 1
        if depth > _MAX_DEPTH:
            raise ModelError(f"{source}: models are nested at most {_MAX_DEPTH} deep; fetch or train the model again.")
        for name, rule in SCHEMAS[kind].items():
            if name in nested and (expected := rule(nested[name])):
                raise ModelError(f"{source}: `{name}` must be {expected}, got {reprlib.repr(nested[name])}.")
        parameters = _estimate_parameters(nested)
        if parameters > _MAX_PARAMETERS:
            raise ModelError(
                f"{source}: describes a network of about {parameters:.1e} parameters; at most {_MAX_PARAMETERS:.1e} "
                "are loaded."
            )
        nested = nested.get("parent") if kind == "StructureDiscoveryModel" else None


def _estimate_parameters(config: Mapping) -> float:
    """Approximate number of weights of the convolutions; only its order of magnitude is used."""
    if "channel_multipliers" in config or "width" in config:
        width, blocks = config.get("width", 64), config.get("blocks_per_level", 2)
        channels = [width * m for m in config.get("channel_multipliers", (1, 2, 4, 8))]
        return sum(4 * 27 * blocks * float(c) ** 2 for c in channels)
    channels = config.get("channels", (8, 16, 16, 32, 32, 64, 64))
    outputs = config.get("num_parts", 2)
    return sum(54 * float(a) * b for a, b in zip(channels, [*channels[1:], channels[-1]], strict=True)) + math.prod(
        (27.0, channels[0], outputs)
    )


def check_scaling(scaling: str, frame: Sequence[int] | None, parent: Mapping | None) -> None:
    """Raise ValueError if scaling and frame do not fit each other or those of the parent."""
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {SCALINGS}, got {scaling!r}.")
    if frame is not None and (scaling != "robust" or len(frame) != 3 or min(frame) < 8):
        raise ValueError(f"`frame` must be three integers >= 8 and needs robust scaling, got {frame}, {scaling!r}.")
    if parent is not None:
        theirs = (parent.get("scaling", "min_max"), parent.get("frame"))
        if theirs[0] != scaling or tuple(theirs[1] or ()) != tuple(frame or ()):
            raise ValueError(f"`scaling` and `frame` must be the parent's, {theirs}; got {(scaling, frame)}.")


def check_spacing(spacing: Sequence[float] | None, unit: str, frame: Sequence[int] | None, parent) -> None:
    """Raise ValueError if a target spacing is invalid, or is not the parent's."""
    if unit not in SPACING_UNITS or (spacing is not None and (len(spacing) != 3 or min(spacing) <= 0)):
        raise ValueError(
            f"`spacing` must be three positive numbers in a unit of {SPACING_UNITS}, got {spacing}, {unit!r}."
        )
    if spacing is not None and frame is not None:
        raise ValueError(f"`spacing` must be left out with a frame, which has a grid of its own; got {spacing}.")
    if parent is not None:
        theirs = (parent.get("spacing"), parent.get("spacing_unit", "mm"))
        if tuple(theirs[0] or ()) != tuple(spacing or ()) or theirs[1] != unit:
            raise ValueError(f"`spacing` must be the parent's, {theirs}; got {(spacing, unit)}.")


def check_bright_part(part: int | None, frame: Sequence[int] | None, children: Sequence[int] | None) -> None:
    """Raise ValueError if the bright part is not one of two into which a part of the parent is divided."""
    if part is None:
        return
    of_output = [parent for parent, count in enumerate(children or ()) for _ in range(count)]
    if frame is None or not part < len(of_output) or children[of_output[part]] != 2:
        raise ValueError(
            f"`bright_part` must be one of two parts that divide a part of the parent, in a network with a frame; got "
            f"{part} with children {children} and frame {frame}."
        )


def check_children(num_parts: int, parent: dict | None, children: Sequence[int] | None) -> None:
    """Raise ValueError if the numbers of children do not fit the parent's parts or do not sum to `num_parts`."""
    if (parent is None) != (children is None):
        raise ValueError("`parent` and `children` go together: give both or neither.")
    if children is None:
        return
    if len(children) != parent["num_parts"] or min(children) < 1 or max(children) < 2 or sum(children) != num_parts:
        raise ValueError(
            f"`children` must be {parent['num_parts']} positive numbers, one for each part of the parent, at least one "
            f"of them above 1, with the sum {num_parts}; got {tuple(children)}."
        )
