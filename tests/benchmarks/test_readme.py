"""The page of the benchmarks lists every result and every module."""

import fnmatch
import re

import pytest

from benchmarks import RESULTS

ROOT = RESULTS.parent
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(p for p in ROOT.glob("*/*.py") if p.name != "__init__.py")


def listed() -> list[str]:
    """File names and patterns in the first cells of the table of results; an ending stands for the name before it."""
    patterns = []
    for cell in re.findall(r"^\| (`[^|]+`) \|", PAGE, flags=re.M):
        for name in re.findall(r"`([^`]+)`", cell):
            patterns.append(patterns[-1].rsplit(".", 1)[0] + name if name.startswith(".") else name)
    return [p for p in patterns if "." in p]


def test_every_result_has_a_row():
    results = {p.name for p in RESULTS.iterdir() if p.is_file() and not p.name.startswith(".")}
    patterns = listed()
    assert len(results) > 30 and "calibration.png" in patterns
    assert not {name for name in results if not any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    assert not {p for p in patterns if not fnmatch.filter(results, p)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_every_module_is_named(path):
    command = f"python -m benchmarks.{path.parent.name}.{path.stem}"
    assert f"`{path.stem}`" in PAGE or re.search(rf"{re.escape(command)}\b", PAGE)


def test_every_command_exists():
    commands = re.findall(r"python -m benchmarks\.(\w+)\.(\w+)", PAGE)
    assert len(commands) > 20
    for folder, name in commands:
        assert (ROOT / folder / f"{name}.py").is_file(), f"{folder}.{name}"
