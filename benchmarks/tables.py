"""Tables 1 and 2 of the paper on our synthetic cells, from nothing: trainings, rivals, ablations, stages, seeds.

    python benchmarks/tables.py FOLDER                                 (everything, its own diffusion models included)
    python benchmarks/tables.py FOLDER --teacher synthetic-regular     (with an embedded diffusion model: hours less)
    python benchmarks/tables.py FOLDER --reuse ...                     (only what is not in `results/tables.json` yet)
    python benchmarks/tables.py FOLDER --have ...                      (computes nothing, writes what there is)

FOLDER keeps models and single figures, so that a run that was stopped goes on. Written are `results/tables.json` and
`docs/tables.md` with its pictures: scores with the spread over seeds, the method's lead over every other row that knows
no labels beside the lead the paper has over BM4D + k-means, and the paper's figures, which are of other volumes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from calibrate import PUBLISHED as PUBLISHED_RIVALS

from diffdiscover3d.evaluation.paper_methods import METHODS
from diffdiscover3d.evaluation.paper_tables import Benchmark, Cell, summarize
from diffdiscover3d.reporting.score_tables import format_table, plot_table
from diffdiscover3d.utils.files import atomic_file, read_json, write_json

FOLDER = Path(__file__).parent
BOTH = ("regular", "irregular")
RIVALS = (
    "k-means",
    "bm4d-k-means",
    *(f"features-k-means-{s}" for s in (1, 2, 3, "all")),
    "denoised-k-means",
)
# methods of other papers; Med3D's are made where MedicalNet's weights are given
LABEL_FREE = ("nalepa", "iic", "jule", "hsu", "med3d-k-means", "med3d")
LABELLED = ("cicek", "zhao", "jiang")
ABLATIONS = ("no-visual", "no-feature", "no-invariance", "as-written")
STAGES = ("stage-1", "stage-2", "stage-3")
# table: (methods, variants, seeds), the quick ones first
GROUPS = (
    (1, RIVALS, BOTH, (0,)),
    (1, LABEL_FREE + LABELLED, BOTH, (0,)),
    (1, ("ours",), BOTH, (0, 1, 2)),
    (1, ABLATIONS, ("regular",), (0,)),
    (2, STAGES, ("regular",), (0,)),
)
LEVELS = (1, 2, 3)
BM4D = METHODS["bm4d-k-means"].title
PUBLISHED = {  # of the paper's own volumes
    ("regular", BM4D): PUBLISHED_RIVALS["regular", BM4D],
    ("regular", "the method"): (0.986, 0.577, 0.397),
    ("irregular", BM4D): PUBLISHED_RIVALS["irregular", BM4D],
    ("irregular", "the method"): (0.967, 0.565, 0.382),
    ("regular", "stage 1"): (0.986, 0.366, 0.273),
    ("regular", "stage 2"): (0.923, 0.577, 0.327),
    ("regular", "stage 3"): (0.878, 0.489, 0.397),
}


def cells(group: tuple) -> list[Cell]:
    """All figures of a group, level by level inside a seed: a level divides the parts of the one before."""
    _, methods, variants, seeds = group
    return [Cell(v, m, level, s) for s in seeds for v in variants for m in methods for level in LEVELS]


def collect(table: Benchmark, fill: bool) -> dict[int, list[dict]]:
    """Rows of each table; without `fill` only those that are there."""
    rows: dict[int, list[dict]] = {}
    for group in GROUPS:
        for cell in cells(group):
            path = table.output / "cells" / f"{cell.name}.json"
            if not path.exists() and (not fill or (METHODS[cell.method].needs_med3d and not table.med3d)):
                continue
            row = table.fill(cell)
            print(f"{cell.name}: {row['dice']:.3f}", flush=True)
            rows.setdefault(group[0], []).append(row)
    return rows


def take_over(table: Benchmark, rows: Sequence[dict]) -> None:
    """Put rows that were written before into the folder, where they were made with the settings of now."""
    for row in rows:
        path = table.output / "cells" / f"{Cell(row['variant'], row['method'], row['level'], row['seed']).name}.json"
        if not path.exists() and row["settings"] == table.settings_of(METHODS[row["method"]]):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, row)


def missing(rows: dict[int, list[dict]]) -> list[str]:
    """Titles of the methods of which something is not there, with the variant."""
    there = {tuple(row[k] for k in ("variant", "method", "level", "seed")) for found in rows.values() for row in found}
    absent = [cell for group in GROUPS for cell in cells(group)]
    absent = [c for c in absent if (c.variant, c.method, c.level, c.seed) not in there]
    return list(dict.fromkeys(f"{METHODS[c.method].title} ({c.variant}, seed {c.seed})" for c in absent))


def leads(summary: Sequence[dict]) -> list[dict]:
    """For each variant and level: ours, the best other row without labels, and the lead the paper has over BM4D."""
    found = []
    rivals = {METHODS[name].title for name in (*RIVALS, *LABEL_FREE, "as-written")}
    for variant in BOTH:
        for level in LEVELS:
            here = [row for row in summary if row["variant"] == variant and row["level"] == level]
            ours = [row for row in here if row["method"] == "ours"]
            others = [row for row in here if row["title"] in rivals]
            bm4d = [row for row in here if row["method"] == "bm4d-k-means"]
            if not (ours and bm4d):
                continue
            best = max(others, key=lambda row: row["dice"])
            ours_of_paper, bm4d_of_paper = (PUBLISHED[variant, name][level - 1] for name in ("the method", BM4D))
            lead, aim = ours[0]["dice"] - bm4d[0]["dice"], round(ours_of_paper - bm4d_of_paper, 3)
            found.append(
                {
                    "variant": variant,
                    "level": level,
                    "ours": ours[0]["dice"],
                    "spread": ours[0]["dice_spread"],
                    "seeds": len(ours[0]["seeds"]),
                    "published": ours_of_paper,
                    "best_other": best["title"],
                    "lead_over_best_other": ours[0]["dice"] - best["dice"],
                    "lead_over_bm4d": lead,
                    "published_lead_over_bm4d": aim,
                    "met": bool(lead >= aim and ours[0]["dice"] >= best["dice"] + aim),
                }
            )
    return found


def format_leads(rows: Sequence[dict]) -> str:
    """The leads as Markdown."""
    lines = [
        "| variant | level | ours | seeds | published for the method | best other row | lead over it | over BM4D | "
        "the paper's over BM4D | |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        met = "met" if row["met"] else "**missed**"
        if row["met"] and row["lead_over_bm4d"] - row["published_lead_over_bm4d"] < row["spread"]:
            met += ", within the spread"
        lines.append(
            f"| {row['variant']} | {row['level']} | {row['ours']:.3f} ± {row['spread']:.3f} | {row['seeds']} | "
            f"{row['published']:.3f} | {row['best_other']} | {row['lead_over_best_other']:+.3f} | "
            f"{row['lead_over_bm4d']:+.3f} | {row['published_lead_over_bm4d']:+.3f} | {met} |"
        )
    return "\n".join(lines) + "\n"


def format_published() -> str:
    """The paper's figures as Markdown."""
    lines = ["| variant | row | level 1 | level 2 | level 3 |", "| --- " * 5 + "|"]
    for (variant, name), figures in PUBLISHED.items():
        lines.append(f"| {variant} | {name} | " + " | ".join(f"{x:.3f}" for x in figures) + " |")
    return "\n".join(lines) + "\n"


def write_page(result: dict, docs: Path) -> Path:
    """`tables.md` and its pictures."""
    parts = [
        "# Scores\n",
        "Written by `python benchmarks/tables.py FOLDER`, from `benchmarks/results/tables.json`. 20 test volumes of "
        "each variant. No row knows labels. ±: the sample's standard deviation over seeds. In brackets k-means is at a "
        "disadvantage, since its clusters have no order.\n",
        '"Ours" is the recipe `small`; λ = 0 leaves out one term of it; stages replace the recipe\'s own at every '
        "level, also in the levels that are divided. Ours begins twice and goes on from the lower loss; without "
        "features nothing is left of that first training, while the teacher still speaks through its clean prediction. "
        "Only ours, its ablations and its stages are nested: each level divides the parts of the one before.\n",
        '"Eq. 4 as written" has the paper\'s losses and its way of training (flat, fresh noise at every step, dropout, '
        "the epoch of highest confidence, 3e-4) at the small size: 1,200 steps for each level, one start.\n",
    ]
    (docs / "tables").mkdir(parents=True, exist_ok=True)
    for number, summary in result["tables"].items():
        parts += [f"## Table {number}\n", format_table(summary), f"\n![Table {number}](tables/table-{number}.png)\n"]
        plot_table(docs / "tables" / f"table-{number}.png", summary)
    if result["missing"]:
        parts += ["Not measured yet: " + ", ".join(result["missing"]) + ".\n"]
    parts += ["## The lead\n", format_leads(result["leads"]), "\n## Published\n", "On the paper's own volumes.\n"]
    parts += [format_published()]
    target = docs / "tables.md"
    with atomic_file(target) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return target


def main() -> None:
    """Fill both tables, or what there is of them, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", help="diffusion model of both variants (default: one is trained for each)")
    parser.add_argument("--reuse", action="store_true", help="keep rows of results/tables.json with these settings")
    parser.add_argument("--have", action="store_true", help="compute nothing, write what is there")
    options = parser.parse_args()
    target, docs = FOLDER / "results" / "tables.json", FOLDER.parent / "docs"
    table = Benchmark(options.folder, teacher=options.teacher)
    if options.reuse and target.exists():
        take_over(table, read_json(target)["rows"])
    rows = collect(table, fill=not options.have)
    summaries = {number: summarize(found) for number, found in rows.items()}
    result = {
        "command": "python benchmarks/tables.py FOLDER" + f" --teacher {options.teacher}" * bool(options.teacher),
        "settings": table.settings,
        "tables": summaries,
        "leads": leads(summaries.get(1, [])),
        "missing": missing(rows),
        "rows": [row for found in rows.values() for row in found],
    }
    write_json(target, result)
    print(write_page(result, docs))


if __name__ == "__main__":
    main()
