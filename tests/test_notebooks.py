"""The notebooks: without outputs in the repository, opened from the docs, and executed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# `discover` has no option for its steps: its preset is replaced
FEWER_STEPS = """
from diffdiscover3d.workflows import discover_plan
discover_plan.PRESETS["quick"].update(diffusion=2, first=2, rounds=0.002)
"""
# what the cells print, with training shortened
PRINTED = {
    "features_of_a_volume": ("stage 3: (1, 16, 50, 50, 50)", "level 2: intensities 0."),
    "from_folder_to_parts": ("synthetic-regular-train-005.nii.gz", "part 3 ", "mean Dice at level 2: 0."),
}


def read(path: Path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def repository() -> str:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean_and_open_in_colab(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert f"git+{repository()}" in code[0].source and 'find_spec("diffdiscover3d") is None' in code[0].source
    colab = repository().replace("https://github.com/", "https://colab.research.google.com/github/")
    address = f"{colab}/blob/main/{path.relative_to(ROOT).as_posix()}"
    page = (ROOT / "docs" / "tutorials" / "notebooks.md").read_text()
    assert f"({address})" in notebook.cells[0].source and f"({address})" in page


def test_both_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == PRINTED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel is a process of its own
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEWER_STEPS))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for expected in PRINTED[path.stem]:
        assert expected in text, text
    assert not re.search(r"Dice at level \d: (?:nan|0\.000)", text)
    if path.stem == "from_folder_to_parts":
        assert len(list((tmp_path / "discovered" / "parts").glob("*_level-2_dseg.nii.gz"))) == 6
        assert any("image/png" in output.get("data", {}) for output in outputs)
