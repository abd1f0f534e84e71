"""The suite's summary: `pytest -m slow tests/reliability --summary FILE` writes what was counted as JSON."""

import json
import time
from pathlib import Path

import pytest
from training_runs import SEED

_COUNTS: dict[str, dict] = {}
_START = time.time()


def pytest_addoption(parser):
    parser.addoption("--summary", help="write the counts of the reliability suite to this JSON file")


@pytest.fixture
def count(request):
    """Figures of one test for the summary: `count(name, **values)`. Written even if the test fails after it."""

    def note(name, **values):
        _COUNTS[name] = values

    return note


def pytest_sessionfinish(session):
    target = session.config.getoption("--summary")
    if not target:
        return
    from diffdiscover3d.reporting.provenance import describe_environment

    outcomes = {
        name: len(session.config.pluginmanager.get_plugin("terminalreporter").stats.get(name, []))
        for name in ("passed", "failed", "skipped", "error")
    }
    summary = {
        "command": "pytest -m slow tests/reliability --summary benchmarks/results/reliability.json",
        "seed": SEED,
        "tests": outcomes,
        "counts": dict(sorted(_COUNTS.items())),
        "seconds": round(time.time() - _START),
        "environment": describe_environment(),
    }
    Path(target).write_text(json.dumps(summary, indent=2) + "\n")
