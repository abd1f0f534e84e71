"""Measurements of the package: speed, the tables of the paper, explorations. Results are committed in `results/`."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
