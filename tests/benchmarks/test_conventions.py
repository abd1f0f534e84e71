"""The figures of the pages about conventions and cohorts are those of the measurements."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "how-to"


def test_half_precision():
    page = (PAGES / "coming-from-diffusers.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "half-precision.json").read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        line = next(x for x in page.splitlines() if x.startswith(f"| `{row['model']}` | {row['level']} |"))
        cell = line.split("|")[3 if row["dtype"] == "bfloat16" else 4].strip()
        assert cell == f"{100 * row['mean_share']:.3f} % ({100 * row['smallest_share']:.3f} %)"
        assert row["smallest_share"] > 0.998


def test_cohort():
    page = (PAGES / "cohorts.md").read_text(encoding="utf-8")
    found = json.loads((RESULTS / "cohort.json").read_text())
    killed, scans = found["killed"], found["scans"]
    assert scans == 1000 and sum(p["scans"] for p in found["memory"]["processes"]) == scans
    for number, row in enumerate(found["memory"]["processes"]):
        cells = [number, row["scans"], f"{row['first_tenth_mib']} MiB", f"{row['last_tenth_mib']} MiB"]
        cells += [f"{row['growth_percent']} %", f"{row['largest_mib']} MiB"]
        assert f"| {' | '.join(map(str, cells))} |" in page
        assert abs(row["growth_percent"]) < 5
    assert 0 < killed["finished_before"] < scans
    assert killed["rows"] == killed["done"] == killed["distinct_scans"] == killed["hashes_of_the_scans"] == scans
    assert killed["parts_equal_those_of_an_uninterrupted_run"] and killed["rows_of_parts"] == 4 * scans
    assert not killed["left_over_files"] and f"killed (SIGKILL) after {killed['finished_before']} scans" in page
