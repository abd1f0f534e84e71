"""The suite's summary: `pytest -m slow tests/robustness --summary FILE` writes the counts as JSON."""

import json
import multiprocessing
from pathlib import Path

import pytest

from tests.helpers.training_runs import DIFFUSION, SEED, command, finish, write_scans

COMMAND = "pytest -m slow tests/robustness --summary benchmarks/results/robustness.json"
PRELOADED = ("segmentation.driver", "train", "training.loop", "training.diffusion", "training.discovery")
_TESTS: dict[str, dict] = {}


def pytest_addoption(parser):
    parser.addoption("--summary", help="write the outcomes and counts of the tests that run into this JSON file")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def teacher(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    options = {**DIFFUSION, "dataset": scans, "output-dir": output, "max-steps": 3, "preview-every": 0}
    assert finish(command("diffusion", options)).returncode == 0
    return output


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes that have imported the libraries already, which takes longer than what is tested in them."""
    context = multiprocessing.get_context("forkserver")
    modules = [f"diffdiscover3d.{name}" for name in PRELOADED]
    context.set_forkserver_preload([*modules, "diffdiscover3d.hub.registry", "monai.networks.nets", "accelerate"])
    return context


@pytest.fixture
def count(request):
    """Record values for the summary: `count(name, **values)`; written even if the test fails afterwards."""

    def note(name, **values):
        request.node.user_properties.append((name, values))

    return note


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        entry = {"outcome": report.outcome, "seconds": round(report.duration), **dict(report.user_properties)}
        if report.outcome == "skipped":
            entry["reason"] = str(report.longrepr[-1])
        _TESTS[report.nodeid.split("robustness/")[-1]] = entry


def pytest_sessionfinish(session):
    """A run of the whole suite writes all entries anew; one of a part of it keeps those of the tests it left out."""
    target = session.config.getoption("--summary")
    if not target or not _TESTS or hasattr(session.config, "workerinput"):  # with xdist, the controller writes it
        return
    options = session.config.option
    whole = all(Path(path).resolve() == Path(__file__).parent for path in session.config.args) and not (
        options.keyword or options.deselect or options.ignore or session.shouldfail or session.shouldstop
    )
    from diffdiscover3d.utils.provenance import describe_environment

    path = Path(target)
    before = json.loads(path.read_text())["tests"] if path.exists() and not whole else {}
    tests = dict(sorted((before | _TESTS).items()))
    outcomes = [entry["outcome"] for entry in tests.values()]
    summary = {
        "command": COMMAND,
        "seed": SEED,
        "one_run": whole,
        "tests_at_once": getattr(session.config.option, "numprocesses", None) or 1,
        "seconds": sum(entry["seconds"] for entry in tests.values()),
        "outcomes": {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")},
        "tests": tests,
        "environment": describe_environment(),
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")
