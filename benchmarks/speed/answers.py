"""Time of the answers that a user waits for: refusals, help, import, and a resume with nothing left to do.

    python -m benchmarks.speed.answers [--baseline REV] [--output FILE]

Every answer is a process of its own, as a user starts it. The unit is `python -c pass`, measured in turns with the
answers, by wall clock and by CPU time, which other programs on the machine disturb less. With `--baseline`, the same is
measured on that commit, in a temporary Git worktree.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import RESULTS
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

ROOT = Path(__file__).parents[2]
UNIT = ["-c", "pass"]
MODULE = ["-m", "diffdiscover3d"]


def main() -> None:
    """Measure this tree, and the baseline if one is given, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", metavar="REV", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "answers.json")
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, worktree(arguments.baseline) as baseline:
        trees = {"now": ROOT} | ({"before": baseline} if baseline else {})
        ways = {}
        for name, tree in trees.items():
            place = Path(folder) / name
            place.mkdir()
            ways[name] = prepare(tree, place)
        found = {name: {answer: [] for answer in one} for name, one in ways.items()}
        for number in range(arguments.rounds + 1):  # the first round fills the caches of the disk
            for name, one in ways.items():
                for answer, command in one.items():
                    measured = run(trees[name], command)
                    if number:
                        found[name][answer].append(measured)
    result = {
        "command": "python -m benchmarks.speed.answers" + (f" --baseline {arguments.baseline}" * bool(baseline)),
        "rounds": arguments.rounds,
        "load_average_before": load,
        "load_average_after": os.getloadavg(),
        "answers": {name: summarise(one) for name, one in found.items()},
        "environment": describe_environment(),
    }
    write_json(arguments.output, result)
    for name, one in result["answers"].items():
        for answer, row in one.items():
            print(
                f"{name:7} {answer:32} exit {row['exit_code']}  {row['seconds']:6.2f} s  {row['ratio']:5.1f} times pass"
            )


@contextmanager
def worktree(revision: str | None) -> Iterator[Path | None]:
    """A temporary checkout of a commit of this repository; `None` without one."""
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), revision], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


def prepare(tree: Path, folder: Path) -> dict[str, list[str]]:
    """Make what the answers are about with the tree's own program; return the command of each."""
    scans, parts, runs = folder / "scans", folder / "parts", folder / "discovered"
    run(tree, [*MODULE, "synthesize", "-n", "2", "-o", str(scans)], check=True)
    two = sorted(str(p) for p in scans.glob("synthetic-*test-00[01].nii.gz"))
    run(tree, [*MODULE, "segment", *two, "-o", str(parts)], check=True)
    (folder / "notes.txt").write_text("not a scan\n" * 100, encoding="utf-8")
    (folder / "page.nii.gz").write_bytes(b"<html>" * 100)
    runs.mkdir()
    (runs / "plan.json").write_text("{}", encoding="utf-8")
    return {
        "python -c pass": UNIT,
        "import diffdiscover3d": ["-c", "import diffdiscover3d"],
        "--help": [*MODULE, "--help"],
        "segment --help": [*MODULE, "segment", "--help"],
        "segment, no such file": [*MODULE, "segment", str(folder / "none.nii.gz")],
        "segment, a wrong file": [*MODULE, "segment", str(folder / "page.nii.gz")],
        "segment, the output is taken": [*MODULE, "segment", two[0], "-o", str(parts)],
        "discover, the folder is finished": [*MODULE, "discover", str(scans), "-o", str(runs)],
        "segment --resume, two are done": [*MODULE, "segment", *two, "-o", str(parts), "--resume"],
    }


def run(tree: Path, command: list[str], check: bool = False) -> dict:
    """Exit code, seconds and CPU seconds of a command with a tree's package."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=tree.parent, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    if check and done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-500:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"exit_code": done.returncode, "seconds": seconds, "cpu_seconds": cpu}


def summarise(measured: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians of every answer, and their ratios to the unit's."""
    medians = {
        answer: {key: statistics.median(one[key] for one in rounds) for key in ("seconds", "cpu_seconds")}
        for answer, rounds in measured.items()
    }
    unit = medians["python -c pass"]
    return {
        answer: {
            "exit_code": measured[answer][0]["exit_code"],
            "seconds": round(found["seconds"], 3),
            "slowest_seconds": round(max(one["seconds"] for one in measured[answer]), 3),
            "cpu_seconds": round(found["cpu_seconds"], 3),
            "ratio": round(found["seconds"] / unit["seconds"], 1),
            "cpu_ratio": round(found["cpu_seconds"] / unit["cpu_seconds"], 1),
        }
        for answer, found in medians.items()
    }


if __name__ == "__main__":
    main()
