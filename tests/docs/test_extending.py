"""The pages on writing a loss and a baseline work when they are followed literally."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs" / "how-to"
SOURCE = r"`((?:diffdiscover3d|benchmarks|tests)/[\w/]+\.py)`"


def steps(page: str) -> list[tuple[str, str, str]]:
    """The last source file named before each block, the language of the block and its code."""
    text, found = (HOW_TO / page).read_text(encoding="utf-8"), []
    for block in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```", text, flags=re.M | re.S):
        if named := re.findall(SOURCE, text[: block.start()]):
            found.append((named[-1], block[2], textwrap.dedent(block[3])))
    return found


def apply_diff(code: str, before: str) -> str:
    """Replace the context and the removed lines of a diff without line numbers by the context and the added lines."""
    lines = code.splitlines()
    assert all(line[:1] in ("+", "-", " ") for line in lines)
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
    assert before.count(old) == 1, old
    return before.replace(old, new)


def apply_diffs(page: str, folder: Path) -> set[str]:
    """Apply the diffs of a page to the copies of the files in a folder, which are made where they are missing."""
    changed = set()
    for name, language, code in steps(page):
        if language == "diff":
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copy(ROOT / name, copy)
            copy.write_text(apply_diff(code, copy.read_text(encoding="utf-8")), encoding="utf-8")
            compile(copy.read_text(encoding="utf-8"), name, "exec")
            changed.add(name)
    return changed


def block(page: str, name: str, language: str) -> str:
    (code,) = [code for file, kind, code in steps(page) if (file, kind) == (name, language)]
    return code


def copied(folder: Path) -> Path:
    """A copy of the repository's Python sources and embedded models."""
    for name in ("diffdiscover3d", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_diffs_of_the_pages_apply(tmp_path):
    assert apply_diffs("write-a-loss.md", tmp_path) == {
        "diffdiscover3d/training/config.py",
        "diffdiscover3d/training/discovery.py",
    }
    assert "lambda_balance" in (tmp_path / "diffdiscover3d/training/config.py").read_text()
    assert apply_diffs("write-a-baseline.md", tmp_path) == {
        "diffdiscover3d/evaluation/methods.py",
        "benchmarks/paper/tables.py",
    }


def test_the_loss_of_the_page_passes_its_test():
    names = {"pytest": pytest, "torch": torch}
    exec(block("write-a-loss.md", "diffdiscover3d/losses.py", "python"), names)
    exec(block("write-a-loss.md", "tests/test_losses.py", "py"), names)
    names["test_size_balance_is_the_relative_entropy_of_the_sizes"]()
    masks = torch.randn(1, 3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    names["size_balance"](masks.softmax(dim=1)).backward()
    assert torch.isfinite(masks.grad).all() and masks.grad.abs().max() > 0


@pytest.mark.slow
def test_a_training_has_the_loss_of_the_page(tmp_path):
    page, folder = "write-a-loss.md", copied(tmp_path)
    apply_diffs(page, folder)
    losses, tests = folder / "diffdiscover3d/losses.py", folder / "tests/test_losses.py"
    code = block(page, "diffdiscover3d/losses.py", "python").replace("import math\n\nimport torch\n", "")
    losses.write_text(losses.read_text() + code)
    own = tests.read_text().replace("region_consistency\n", "region_consistency, size_balance\n", 1)
    tests.write_text(own + "\n\n" + block(page, "tests/test_losses.py", "py"))
    commands = block(page, "tests/test_losses.py", "text").replace("\\\n", " ").splitlines()
    assert [line.split()[0] for line in commands] == ["pytest", "diffdiscover3d"]
    run(folder, *shlex.split(commands[0]))
    run(folder, *commands[1].split())
    lines = [json.loads(line) for line in (folder / "try" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["balance"] < 0.1 for line in lines)


@pytest.mark.slow
def test_the_benchmark_has_the_row_of_the_page(tmp_path):
    page, folder = "write-a-baseline.md", copied(tmp_path)
    apply_diffs(page, folder)
    code = block(page, "diffdiscover3d/baselines/quantiles.py", "python")
    code = code.split("\n\n\nvolume = ")[0] + "\n"
    (folder / "diffdiscover3d/baselines/quantiles.py").write_text(code)
    run(folder, "pytest", "-q", "tests/benchmarks/test_tables.py::test_every_row_of_both_tables_is_made")
    command = block(page, "diffdiscover3d/evaluation/brats_table.py", "text").split()
    run(folder, *command, "--level", "1")
    table = (folder / "OUTPUT" / "table.md").read_text()
    assert table.count("| quantiles | 0.") == 2
