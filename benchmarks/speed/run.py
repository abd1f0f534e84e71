"""Run all speed benchmarks, one after the other.

    python -m benchmarks.speed.run                  (about an hour on two cores; use a quiet machine)
    python -m benchmarks.speed.run --device cuda    (the rows of a GPU)

Results of the current code are not measured again, so an interrupted run resumes; `--again` measures everything.
`python -m benchmarks.speed.report` writes the page.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.speed.timing import ROOT, code_version, module_of, result_path

# in the order in which they run, the quick ones first
BENCHMARKS = (
    "loss",
    "features",
    "diffusion-step",
    "discovery-step",
    "segment-cost",
    "budget",
    "scaling",
    "compiled",
)
CPU_ONLY = ("scaling",)


def is_fresh(result: Path, name: str) -> bool:
    """Whether a result exists and was made by the current code."""
    try:
        return json.loads(result.read_text(encoding="utf-8"))["code"] == code_version(name)
    except (OSError, ValueError, KeyError):
        return False


def commands(device: str, quick: bool) -> list[tuple[str, Path, list[str]]]:
    """Name, result and command line of every benchmark that runs on a device."""
    names = [name for name in BENCHMARKS if device == "cpu" or name not in CPU_ONLY]
    options = ["--device", device, *["--quick"] * quick]
    return [(n, result_path(n, device, quick), [sys.executable, "-m", module_of(n), *options]) for n in names]


def main() -> int:
    """Run the benchmarks that have no current result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="also measure again what has a current result")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="short trials, kept apart from the results")
    options = parser.parse_args()
    failed = []
    for name, result, command in commands(options.device, options.quick):
        if not options.again and is_fresh(result, name):
            print(f"{result} is up to date.", flush=True)
            continue
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:  # go on with the others
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
