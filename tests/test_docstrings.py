"""The examples in docstrings run and print the documented output."""

import doctest
import importlib
from pathlib import Path

import pytest

import diffdiscover3d

ROOT = Path(diffdiscover3d.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("diffdiscover3d", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name):
    if name.endswith("hf_datasets"):
        pytest.importorskip("datasets")
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0 and found.attempted > 0


def test_models_and_pipelines_have_examples():
    assert {"diffdiscover3d.models.structure_discovery", "diffdiscover3d.pipelines.diffusion_feature"} <= set(
        WITH_EXAMPLES
    )
