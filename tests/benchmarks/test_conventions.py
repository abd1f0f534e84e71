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
