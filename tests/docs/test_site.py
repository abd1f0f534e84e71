"""The generated reference pages are complete, and the tutorials run as they are written."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from diffdiscover3d import errors
from diffdiscover3d.cli.app import app
from diffdiscover3d.train import _PHASES
from diffdiscover3d.training.config import TrainingConfig
from tests.helpers.loopback_hub import LoopbackHub
from tools import docs_hooks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# fewer steps than a user would take
FEWER_STEPS = (
    ("train diffusion --preset small", "train diffusion --preset small --max-steps 2 --sample-size 16 --batch-size 2"),
    ("train discovery --preset small", "train discovery --preset small --max-steps 2"),
    ("accelerate launch -m", "python -m"),
)
# `discover` has no option for its steps: its presets are replaced
COMMAND = """
import sys
from diffdiscover3d.workflows import discover_plan
discover_plan.PRESETS["quick"].update(diffusion=2, first=2, rounds=0.002)
from diffdiscover3d.cli.app import main
sys.exit(main())
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of the bash and Python blocks of a page, in their order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def run_here(page: Path) -> None:
    """Run all blocks of a page in this process and folder; bash blocks may only hold `diffdiscover3d` commands."""
    found = blocks(page)
    assert found
    for language, code in found:
        if language == "python":
            exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
            continue
        for line in code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "diffdiscover3d", line
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def run_page(page: Path, folder: Path, changes=()) -> None:
    """Run all blocks of a page in a folder, each in a process of its own."""
    (folder / "command.py").write_text(COMMAND)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for language, code in blocks(page):
        for old, new in changes:
            code = code.replace(old, new)
        if language == "bash":
            code = f'diffdiscover3d() {{ python "{folder}/command.py" "$@"; }}\n{code}'
        command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run([*command, code], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    "name", ["tutorials/segment-a-scan.md", "how-to/write-a-baseline.md"], ids=lambda name: Path(name).stem
)
def test_pages_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here(DOCS / name)
    if name.startswith("tutorials"):
        assert len(list((tmp_path / "parts").glob("*_level-?_dseg.nii.gz"))) == 3


@pytest.mark.slow
def test_the_diffusers_page_runs(tmp_path, monkeypatch):
    """Its blocks are one script."""
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    page = DOCS / "how-to/coming-from-diffusers.md"
    exec(compile("\n".join(code for _, code in blocks(page)), str(page), "exec"), found)
    assert found["coarse"].shape == (2, 64, 6, 6, 6) and found["images"][0].shape == (24, 24, 24, 16)
    assert found["volumes"].shape == (2, 1, 48, 48, 48) and [step for step, *_ in found["shown"]] == [0, 1, 2, 3]
    assert found["row"]["volume"].shape == (50, 50, 50)


def test_the_hub_tutorial_runs(tmp_path):
    """In one process of its own, because huggingface_hub reads its environment when it is imported."""
    code = "import sys, pathlib; from tests.docs.test_site import run_here; run_here(pathlib.Path(sys.argv[1]))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with LoopbackHub() as hub:
        environment = {**clean, **hub.environment(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(DOCS / "tutorials/share-on-the-hub.md")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.repos["models", "user/my-parts"].private
    assert (tmp_path / "parts" / "synthetic-regular-test-000_dseg.nii.gz").is_file()


@pytest.mark.slow
def test_the_training_tutorial_runs_with_few_steps(tmp_path):
    page = DOCS / "tutorials/train-on-your-folder.md"
    for old, _ in FEWER_STEPS:
        assert old in page.read_text(encoding="utf-8")
    run_page(page, tmp_path, FEWER_STEPS)
    assert (tmp_path / "discovered" / "index.html").is_file()
    assert len(list((tmp_path / "out" / "finer-parts").glob("*_tree.json"))) == 4


def test_every_command_and_option_is_in_the_reference():
    page = docs_hooks.commands()
    sections = {block.split("`")[1]: block for block in page.split("## ")[1:]}
    commands = dict(docs_hooks.walk_commands(get_command(app)))
    assert sections.keys() == commands.keys() and "models list" in commands
    for name, command in commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in sections[name] and parameter.help in sections[name]
    assert "(`1`, `2`, `3`, `all`)" in sections["segment"] and "segment [OPTIONS] INPUT..." in sections["segment"]


def test_every_training_option_is_in_the_reference_once():
    page = docs_hooks.training_options()
    shared = {field.name for field in dataclasses.fields(TrainingConfig)}
    sections = {block.split("\n")[0]: block for block in page.split("## ")[1:]}
    assert sections.keys() == {*(f"`{phase}`" for phase in _PHASES), "Options of all trainings"}
    for phase, kind in _PHASES.items():
        for field in dataclasses.fields(kind):
            section = "Options of all trainings" if field.name in shared else f"`{phase}`"
            flag = field.name.replace("_", "-")
            assert len(re.findall(rf"^\| `--{flag}` \|", sections[section], flags=re.M)) == 1, (phase, flag)
    # values worked out by hand: `small` changes the rate of both trainings
    (row,) = re.findall(r"^\| `--learning-rate`.*$", page, flags=re.M)
    assert "small: `0.0008`" in row and "paper: `0.0003`" in row


def test_every_error_has_its_exit_code():
    page = docs_hooks.exit_codes()
    for name, code in (("InputError", 3), ("OutputError", 4), ("ModelError", 5), ("MemoryLimitError", 7)):
        assert getattr(errors, name).exit_code == code and f"| {code} | `{name}` |" in page


def test_every_public_name_is_in_the_api():
    import diffdiscover3d

    page = docs_hooks.api()
    for name in diffdiscover3d.__all__:
        assert name.isupper() or name == "__version__" or re.search(rf"^::: [\w.]+\.{name}$", page, flags=re.M), name


def test_markers_are_replaced_on_the_pages():
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md")}
    used = {name for page in pages.values() for name in docs_hooks.MARKER.findall(page)}
    assert used == set(docs_hooks.GENERATORS)
    assert "generated:" not in docs_hooks.on_page_markdown(pages["exit-codes"])
