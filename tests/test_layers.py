"""The direction of imports: down the layers only, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import diffdiscover3d

ROOT = Path(diffdiscover3d.__file__).parent
# lowest first; a module may import from its own layer and from those before it
LAYERS = [
    ["", "errors"],
    [
        "files",
        "progress",
        "interruption",
        "memory",
        "windows",
        "data.payload",
        "data.voxels",
        "data.raw_grid",
        "data.nifti_output",
        "losses",
        "metrics",
        "postprocessing",
        "models.blocks",
        "data.transforms",
        "data.synthetic",
    ],
    [
        "data.nifti_header",
        "data.nifti",
        "data.slabs",
        "training.config",
        "training.sampling",
        "training.checkpoints",
        "reporting",
    ],
    ["hub_files", "cards", "hub_upload", "models.loading"],
    ["models", "data"],
    ["pipelines"],
    ["hub", "baselines", "training", "results", "labelling", "streamed_labelling"],
    ["segmentation", "extraction", "evaluation", "brats_evaluation", "report", "doctor"],
    ["benchmark"],
    ["discovery_plan"],
    ["discover"],
    ["commands"],
    ["train", "cli"],
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


def layer_of(name: str) -> int:
    matches = [
        (len(prefix), i) for i, layer in enumerate(LAYERS) for prefix in layer if f"{name}.".startswith(f"{prefix}.")
    ]
    assert matches or name == "", f"{name} is in no layer: add it to LAYERS"
    return max(matches)[1] if matches else 0


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
# the package's own names for type checkers are no imports
GRAPH = {name: imports_of(path) - {name} for name, path in MODULES.items() if name != ""}


def test_imports_point_down():
    upward = [(a, b) for a, targets in GRAPH.items() for b in targets if layer_of(b) > layer_of(a)]
    assert not upward


def test_no_cycles():
    assert list(TopologicalSorter(GRAPH).static_order())


def test_nothing_imports_the_command_lines():
    assert not [(a, b) for a, targets in GRAPH.items() for b in targets if b in ("cli", "train")]


def test_package_root_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, diffdiscover3d, diffdiscover3d.cli;"
        "print(sorted({'torch', 'numpy', 'diffusers', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_public_names_resolve():
    for name in diffdiscover3d.__all__:
        assert getattr(diffdiscover3d, name) is not None
    assert set(diffdiscover3d.__all__) <= set(dir(diffdiscover3d))
