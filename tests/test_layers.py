"""Imports point down the layers and have no cycles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import diffdiscover3d

ROOT = Path(diffdiscover3d.__file__).parent
# lowest first: a module imports from its own wing and from those before it
WINGS = [
    "errors",
    "utils",
    "losses",
    "data",
    "models",
    "reporting",
    "pipelines",
    "training",
    "hub",
    "segmentation",
    "baselines",
    "evaluation",
    "workflows",
    "app",
    "train",
    "cli",
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


def wing_of(name: str) -> int:
    return WINGS.index(name.split(".")[0])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffdiscover3d":
            base = node.module.removeprefix("diffdiscover3d").removeprefix(".")
            for alias in node.names:
                deeper = ".".join(filter(None, [base, alias.name]))
                found.add(deeper if deeper in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("diffdiscover3d.") for a in node.names if a.name.startswith("diffdiscover3d.")
            }
    return found


MODULES = {module_name(p): p for p in ROOT.rglob("*.py")}
# the root contains names for type checkers only, and `__main__` starts the command line
GRAPH = {name: imports_of(path) - {name, ""} for name, path in MODULES.items() if name not in ("", "__main__")}


def test_the_root_holds_what_a_reader_looks_for_first():
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "losses.py", "train.py"}


def test_imports_point_down():
    upward = [(a, b) for a, targets in GRAPH.items() for b in targets if wing_of(b) > wing_of(a)]
    assert not upward


def test_files_are_short():
    assert not {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 350}


def test_no_cycles():
    assert list(TopologicalSorter(GRAPH).static_order())


def test_nothing_imports_the_command_lines():
    entries = ("cli", "train")
    assert not [
        (a, b)
        for a, targets in GRAPH.items()
        for b in targets
        if b.split(".")[0] in entries and a.split(".")[0] not in entries
    ]


def test_package_root_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, diffdiscover3d, diffdiscover3d.cli.app;"
        "print(sorted({'torch', 'numpy', 'diffusers', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_public_names_resolve():
    for name in diffdiscover3d.__all__:
        assert getattr(diffdiscover3d, name) is not None
    assert set(diffdiscover3d.__all__) <= set(dir(diffdiscover3d))
