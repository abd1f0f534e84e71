"""Training options: the fields of the config dataclasses, read from config files and command lines."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffdiscover3d.errors import InputError, first_line
from diffdiscover3d.training.aliases import aliases_of, as_fields, explain_unknown


def option(default, help: str, choices: tuple | None = None, record_default: bool = True):
    """A dataclass field that is also a command-line option.

    Args:
        record_default: whether `as_dict` contains the option at its default. Off for options that were added later, so
            that records of trainings without them are unchanged.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "record_default": record_default}
    )


def added(default, help: str, choices: tuple | None = None):
    """An option that records of earlier trainings do not have: its default is not recorded."""
    return option(default, help, choices, record_default=False)


def require(holds: bool, name: str, rule: str, value) -> None:
    """Raise ValueError, naming an option, its rule and its value, unless the rule holds."""
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def read_options(kind: type, file: str | Path, given: Mapping | None = None) -> dict:
    """Read option values from a JSON or YAML file; dashes and underscores in option names are equivalent.

    Args:
        kind: config class whose fields are the options; the names of [`ALIASES`] are accepted too.
        given: options from elsewhere that take precedence, for conversions that depend on them.

    Raises:
        InputError: if the file is missing, is not a mapping, or contains an unknown option or a value of another type.
        ValueError: if an option and its alias have different values.
    """
    path = Path(file)
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
            raise OSError("not a file")
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
        raise InputError(f"{path}: not valid YAML ({first_line(error)}).") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a config file must map option names to values, got {type(values).__name__}.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    hints = typing.get_type_hints(kind)
    for alias in aliases_of(kind).values():
        hints[alias.name] = alias.kind or hints[alias.field]
    unknown = sorted(set(values) - set(hints))
    if unknown:
        known = sorted(f.name for f in dataclasses.fields(kind))
        raise InputError(f"{path}: {explain_unknown(unknown[0], kind)} (unknown: {unknown}; valid: {known}).")
    values = {key: _as_type(path, key, value, hints[key]) for key, value in values.items()}
    return as_fields(kind, values, {**values, **(given or {})})


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
    """Add one option per field of `kind`, with its aliases, to an `argparse` parser.

    Options not given are absent from the namespace. Converted aliases are in it under their own names.
    """
    import argparse

    hints, aliases = typing.get_type_hints(kind), aliases_of(kind).values()
    for f in dataclasses.fields(kind):
        names = [f.name, *(a.name for a in aliases if a.field == f.name and a.convert is None)]
        flags, hint, help_text = [_flag(name) for name in names], hints[f.name], f.metadata["help"]
        arguments = {"dest": f.name, "default": argparse.SUPPRESS}
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if isinstance(hint, types.UnionType):
            hint = inner[0]
        shown = "none" if f.default in (None, "") else f.default
        arguments["help"] = f"{help_text} (default: {shown})".replace("%", "%%")
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            arguments |= {"type": typing.get_args(hint)[0], "nargs": "+"}
        else:
            arguments |= {"type": hint, "choices": f.metadata["choices"]}
        parser.add_argument(*flags, **arguments)
    for alias in aliases:
        if alias.convert is not None:
            by_type = {"action": argparse.BooleanOptionalAction} if alias.kind is bool else {"type": alias.kind}
            note = f"as in diffusers, in place of {_flag(alias.field)}: {alias.note.replace('`', '')}"
            parser.add_argument(_flag(alias.name), dest=alias.name, default=argparse.SUPPRESS, help=note, **by_type)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with dashes in place of the underscores of option names."""
    changed = []
    for word in arguments:
        name, equals, value = word.partition("=")
        changed.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return changed


def check_unknown(words: Sequence[str], kind: type, others: Mapping[str, type]) -> None:
    """Explain arguments that are no options of a training. Values are not repeated: they may be secret.

    Raises:
        ValueError: if there are any.
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if flags:
        raise ValueError(f"{explain_unknown(flags[0], kind, others)} (--help lists all options).")
    if words:
        raise ValueError("unexpected arguments without an option's name (--help lists all options).")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
