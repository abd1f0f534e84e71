"""MkDocs hooks: fill the reference pages from the code, so that no list in them is copied by hand.

A line `<!-- generated: NAME -->` of a page is replaced by what the function NAME of `GENERATORS` returns.
"""

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffdiscover3d.reporting.markdown import markdown_table

MARKER = re.compile(r"^<!-- generated: ([a-z_]+) -->$", flags=re.M)


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the markers of a page."""
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


def on_page_content(html: str, **_) -> str:
    """Docstrings refer to names as [`name`]; show them without the brackets."""
    return re.sub(r"\[(<code>[^<]+</code>)\]", r"\1", html)


def api() -> str:
    """One mkdocstrings block for each public name of the package."""
    import diffdiscover3d

    # names in capitals are constants; they are described with the classes they belong to
    names = {name: module for name, module in diffdiscover3d._MODULES.items() if not name.isupper()}
    return "\n\n".join(f"::: diffdiscover3d.{module}.{name}" for name, module in names.items())


def commands() -> str:
    """Every command of `diffdiscover3d` with its arguments and options, from the Typer application."""
    from typer.main import get_command

    from diffdiscover3d.cli.app import app

    blocks = []
    for name, command in walk_commands(get_command(app)):
        usage = " ".join(["diffdiscover3d", name, *_usage(command)])
        blocks.append(f"## `{name}`\n\n{_paragraphs(command.help)}\n\n```text\n{usage}\n```\n")
        types = typing.get_type_hints(inspect.unwrap(command.callback))
        rows = [(_names(p), _describe(p, types.get(p.name)), _default(p)) for p in command.params if p.name != "help"]
        if rows:
            blocks.append(markdown_table(["argument or option", "meaning", "default"], rows) + "\n")
        if command.epilog:
            blocks.append(_code_example(command.epilog) + "\n")
    return "\n".join(blocks)


def walk_commands(group, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Name and command of every command of a group and of the groups in it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from walk_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def training_options() -> str:
    """The options of all trainings, from the dataclasses, with the defaults of every preset."""
    from diffdiscover3d.train import _PHASES
    from diffdiscover3d.training.config import TrainingConfig

    shared = [field.name for field in dataclasses.fields(TrainingConfig)]
    blocks = []
    for name, kind in _PHASES.items():
        own = [field for field in dataclasses.fields(kind) if field.name not in shared]
        blocks += [f"## `{name}`\n\n{_paragraphs(kind.__doc__)}\n", _options_table(kind, own)]
    return "\n".join([*blocks, f"## Options of all trainings\n\n{_shared_table(shared, _PHASES)}"])


def diffusers_options() -> str:
    """The options of diffusers' example scripts and what they are here, from the table of aliases."""
    from diffdiscover3d.train import _PHASES
    from diffdiscover3d.training.aliases import ABSENT, ALIASES, SAME_NAMES

    def trainings(name: str) -> str:
        found = [phase for phase, kind in _PHASES.items() if name in {f.name for f in dataclasses.fields(kind)}]
        return "" if len(found) == len(_PHASES) else "only `" + "`, `".join(found) + "`"

    def row(name: str, field: str, note: str) -> tuple[str, str, str]:
        return f"`--{name}`", f"`--{field.replace('_', '-')}`", "; ".join(filter(None, (note, trainings(field))))

    rows = [row(alias.name, alias.field, alias.note) for alias in ALIASES]
    rows += [row(name, name, "") for name in SAME_NAMES]
    absent = [(f"`--{name}`", reason) for name, reason in sorted(ABSENT.items())]
    return (
        markdown_table(["diffusers", "here", "remarks"], sorted(rows))
        + "\n\nOptions without an equivalent; the error message gives the reason:\n\n"
        + markdown_table(["diffusers", "reason"], absent)
        + "\n"
    )


def _presets(kind: type) -> dict[str, object]:
    """The config of every preset of a training."""
    from diffdiscover3d.training.config import make_config

    field = next(f for f in dataclasses.fields(kind) if f.name == "preset")
    return {preset: make_config(kind, preset=preset) for preset in field.metadata["choices"]}


def _options_table(kind: type, fields) -> str:
    presets = _presets(kind)
    header = ["option", "meaning", *(f"`{preset}`" for preset in presets)]
    rows = [(_flag(f), _meaning(f), *(_value(getattr(c, f.name)) for c in presets.values())) for f in fields]
    return markdown_table(header, rows) + "\n"


def _shared_table(names: Sequence[str], phases: Mapping[str, type]) -> str:
    """Options that all trainings have; a cell holds one value where all presets agree, otherwise one per preset."""
    presets = {phase: _presets(kind) for phase, kind in phases.items()}
    rows = []
    for name in names:
        fields = [next(f for f in dataclasses.fields(kind) if f.name == name) for kind in phases.values()]
        cells = []
        for configs in presets.values():
            values = {preset: _value(getattr(config, name)) for preset, config in configs.items()}
            one = len(set(values.values())) == 1
            cells.append(next(iter(values.values())) if one else ", ".join(f"{k}: {v}" for k, v in values.items()))
        rows.append((_flag(fields[0]), _meaning(fields[0]), *cells))
    return markdown_table(["option", "meaning", *(f"`{phase}`" for phase in phases)], rows) + "\n"


def exit_codes() -> str:
    """Exit codes and their meaning, from the error classes."""
    from diffdiscover3d import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.DiffDiscoverError)]
    rows = [
        (k.exit_code, f"`{k.__name__}`", _paragraphs(k.__doc__)) for k in kinds if k is not errors.DiffDiscoverError
    ]
    rows += [
        (0, "", "The command finished."),
        (2, "`ValueError`", "The command line or the value of an option is wrong."),
        (130, "", "Interrupted by SIGINT or SIGTERM."),
    ]
    return markdown_table(["code", "error", "meaning"], sorted(rows, key=lambda row: row[0]))


GENERATORS = {f.__name__: f for f in (api, commands, training_options, diffusers_options, exit_codes)}


def _flag(field: dataclasses.Field) -> str:
    return f"`--{field.name.replace('_', '-')}`"


def _meaning(field: dataclasses.Field) -> str:
    choices = field.metadata["choices"]
    return field.metadata["help"] + (f" ({', '.join(f'`{c}`' for c in choices)})" if choices else "")


def _value(value: object) -> str:
    if value is None or value == "":
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _usage(command) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return ["[OPTIONS]", *(_argument(p) for p in arguments)]


def _argument(parameter) -> str:
    return (parameter.metavar or parameter.name.upper()).rstrip(".") + "..." * (parameter.nargs == -1)


def _names(parameter) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_argument(parameter)}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _describe(parameter, annotation: object) -> str:
    """The help of a parameter, with its choices if it is an enumeration."""
    kinds = [k for k in (annotation, *typing.get_args(annotation)) if isinstance(k, type) and issubclass(k, Enum)]
    choices = ", ".join(f"`{choice.value}`" for kind in kinds for choice in kind)
    return (parameter.help or "") + (f" ({choices})" if choices else "")


def _default(parameter) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if default is None or default is False or callable(default) or default == () or not str(default).strip():
        return ""
    default = getattr(default, "value", default)
    return f"`{' '.join(map(str, default)) if isinstance(default, list | tuple) else default}`"


def _paragraphs(text: str | None) -> str:
    return " ".join((text or "").replace("\b", "").split())


def _code_example(text: str) -> str:
    kind, _, line = _paragraphs(text).partition(": ")
    return f"{kind}:\n\n```bash\n{line}\n```" if line else kind
