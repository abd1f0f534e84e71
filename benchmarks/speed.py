"""All speed benchmarks, one after the other, and the page of their results.

    python benchmarks/speed.py                  (the better part of an hour on two cores; on a quiet machine)
    python benchmarks/speed.py --device cuda    (the rows of a GPU)
    python benchmarks/speed.py --report         (docs/speed.md and its pictures, from the results alone)

What was measured with the same code is not measured again, so a run that was stopped goes on; --again measures all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from speed_report import write_report
from timing import RESULTS, code_version, result_path

FOLDER = Path(__file__).parent
BENCHMARKS = {  # result: script, in the order in which they run; the quick ones first
    "loss": "loss.py",
    "features": "features.py",
    "diffusion-step": "diffusion_step.py",
    "discovery-step": "discovery_step.py",
    "segment-cost": "segment_cost.py",
    "budget": "budget.py",
    "scaling": "scaling.py",
    "compiled": "compiled.py",
}
CPU_ONLY = ("scaling",)


def is_fresh(result: Path, script: Path) -> bool:
    """Whether a result is there and was made by the code as it is now."""
    try:
        return json.loads(result.read_text(encoding="utf-8"))["code"] == code_version(script)
    except (OSError, ValueError, KeyError):
        return False


def commands(device: str, quick: bool) -> list[tuple[Path, Path, list[str]]]:
    """Result, script and command line of every benchmark that runs on a device."""
    found = []
    for name, script in BENCHMARKS.items():
        if device != "cpu" and name in CPU_ONLY:
            continue
        command = [sys.executable, str(FOLDER / script), "--device", device, *["--quick"] * quick]
        found.append((result_path(name, device, quick), FOLDER / script, command))
    return found


def main() -> int:
    """Measure what is not measured yet, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write docs/speed.md, measure nothing")
    parser.add_argument("--again", action="store_true", help="measure also what is measured already")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="short trials, kept apart from the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the report finds the results")
    parser.add_argument("--docs", type=Path, default=FOLDER.parent / "docs", help="where the report is written")
    options = parser.parse_args()
    if options.report:
        print(write_report(options.results, options.docs, BENCHMARKS))
        return 0
    failed = []
    for result, script, command in commands(options.device, options.quick):
        if not options.again and is_fresh(result, script):
            print(f"{result} is up to date.", flush=True)
            continue
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command).returncode:  # the others can still be measured
            failed.append(script.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
