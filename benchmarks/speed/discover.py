"""Time and peak memory of `discover`, from a folder of scans to its report.

    python -m benchmarks.speed.discover FOLDER OUTPUT > FILE

FOLDER holds the scans (made by `diffdiscover3d synthesize -n 12 -o FOLDER`); OUTPUT must not exist yet. The load of the
machine before and after is recorded too, since other programs slow the run down.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from diffdiscover3d.utils.provenance import describe_environment


def main() -> None:
    """Run the command as a user would, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scans")
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", default="quick")
    arguments = parser.parse_args()
    command = ["discover", arguments.scans, "--preset", arguments.preset, "--device", "cpu"]
    steps, before, clock = [], os.getloadavg(), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "diffdiscover3d.cli", *command, "-o", str(arguments.output)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            steps.append({"at_seconds": round(time.perf_counter() - clock, 1), "line": line.strip()})
            print(steps[-1], file=sys.stderr, flush=True)
    seconds, used = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(process.returncode)
    plan = json.loads((arguments.output / "plan.json").read_text(encoding="utf-8"))
    result = {
        "command": ["diffdiscover3d", *command[:1], "FOLDER", *command[2:]],
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_gib": round(used.ru_maxrss / 2**20, 2),  # of the largest of its processes; Linux counts in KiB
        "load_average_before": before,
        "load_average_after": os.getloadavg(),
        "niceness": os.nice(0),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "steps": [s for s in steps if s["line"].startswith("Step")],
        "plan": {**plan, "scans": [Path(scan).name for scan in plan["scans"]]},
        "environment": describe_environment(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
