"""Tables 1 and 2 of the paper on our synthetic cells, from scratch: trainings, baselines, ablations, stages, seeds.

    python -m benchmarks.paper.tables FOLDER                               (trains its own diffusion models too)
    python -m benchmarks.paper.tables FOLDER --teacher synthetic-regular   (uses an embedded one: saves hours)
    python -m benchmarks.paper.tables FOLDER --reuse ...                   (only what `results/tables.json` lacks)
    python -m benchmarks.paper.tables FOLDER --have ...                    (computes nothing, writes what exists)

FOLDER keeps the models and the score of each cell, so that an interrupted run resumes. The command writes
`results/tables.json`, and `docs/tables.md` with its pictures: scores with their spread over seeds, the lead of the
method over every other unsupervised row beside the lead reported in the paper over BM4D + k-means, and the published
scores, which were measured on other volumes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import DOCS, RESULTS
from diffdiscover3d.evaluation.methods import METHODS, SEMI, SUPERVISED
from diffdiscover3d.evaluation.paper_tables import Cell, PaperTable, mean_over_seeds
from diffdiscover3d.evaluation.published import PUBLISHED_DICE
from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.reporting.score_tables import LABEL_AMOUNTS, format_table, plot_table
from diffdiscover3d.utils.files import atomic_file, read_json, write_json

BOTH = ("regular", "irregular")
BASELINES = (
    "k-means",
    "bm4d-k-means",
    *(f"features-k-means-{s}" for s in (1, 2, 3, "all")),
    "spatial-k-means",
    "denoised-k-means",
)
# methods of other papers; Med3D's are made where MedicalNet's weights are given
LABEL_FREE = ("nalepa", "iic", "jule", "hsu", "med3d-k-means", "med3d")
LABELLED = ("cicek", "zhao", "jiang")
STRONGEST = ("nalepa", "cicek", "jiang")  # three seeds, the strongest of each kind at level 2
TERMS = ("no-visual", "no-feature", "no-invariance", "as-written")
ASSIGNMENTS = ("first-round", "no-space", "no-smooth", "no-recolor")
ABLATIONS = (*TERMS, *ASSIGNMENTS)
STAGES = ("stage-1", "stage-2", "stage-3")
# table: (methods, variants, seeds), the quick ones first
GROUPS = (
    (1, BASELINES, BOTH, (0,)),
    (1, (*LABEL_FREE, *LABELLED, "supervised"), BOTH, (0,)),
    (1, ("ours", "consistency"), BOTH, (0, 1, 2)),
    (1, STRONGEST, BOTH, (1, 2)),
    (1, ABLATIONS, ("regular",), (0,)),
    (2, STAGES, ("regular",), (0,)),
)
LEVELS = (1, 2, 3)
# why a row is below its published score, by method
REASONS = {
    "hsu": "level 1 agrees; patches of 9³ voxels and 3,000 steps; whether more would close the gap was not tried",
    "zhao": "300, 200 and 500 steps of its three trainings, in place of 30,000 each; more were not tried",
    "cicek": "4,000 steps of two cubes of 48³, in place of 70,000 of one cube of 128³; at level 2 of the regular "
    "validation volumes, 1,000 steps give .589 and 4,000 .765 (`budgets.json`)",
}
BM4D = METHODS["bm4d-k-means"].title
# rows of the paper that the page lists, and what it calls them
PUBLISHED_ROWS = (
    ("regular", BM4D, BM4D),
    ("regular", "ours", "the method"),
    ("irregular", BM4D, BM4D),
    ("irregular", "ours", "the method"),
    *(("regular", f"stage {stage}", f"stage {stage}") for stage in (1, 2, 3)),
)


def cells(group: tuple) -> list[Cell]:
    """All figures of a group, level by level inside a seed: a level divides the parts of the one before."""
    _, methods, variants, seeds = group
    return [Cell(v, m, level, s) for s in seeds for v in variants for m in methods for level in LEVELS]


def collect(table: PaperTable, fill: bool) -> dict[int, list[dict]]:
    """Rows of each table; without `fill` only those that are there for all levels of a seed."""
    rows: dict[int, list[dict]] = {}
    for group in GROUPS:
        for cell in cells(group):
            levels = [table.output / "cells" / f"{replace(cell, level=level).name}.json" for level in LEVELS]
            is_there = all(path.exists() for path in levels)
            if not is_there and (not fill or (METHODS[cell.method].needs_med3d and not table.med3d)):
                continue
            row = table.fill(cell)
            print(f"{cell.name}: {row['dice']:.3f}", flush=True)
            rows.setdefault(group[0], []).append(row)
    return rows


def take_over(table: PaperTable, rows: Sequence[dict]) -> None:
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
    baselines = {METHODS[name].title for name in (*BASELINES, *LABEL_FREE, "as-written")}
    for variant in BOTH:
        for level in LEVELS:
            here = [row for row in summary if row["variant"] == variant and row["level"] == level]
            ours = [row for row in here if row["method"] == "ours"]
            others = [row for row in here if row["title"] in baselines]
            bm4d = [row for row in here if row["method"] == "bm4d-k-means"]
            if not (ours and bm4d):
                continue
            best = max(others, key=lambda row: row["dice"])
            ours_of_paper, bm4d_of_paper = (PUBLISHED_DICE[variant, name][level - 1] for name in ("ours", BM4D))
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
    header = ["variant", "level", "ours", "seeds", "published for the method", "best other row", "lead over it"]
    header += ["over BM4D", "the paper's over BM4D", "target"]
    cells = []
    for row in rows:
        met = "met" if row["met"] else "**missed**"
        if row["met"] and row["lead_over_bm4d"] - row["published_lead_over_bm4d"] < row["spread"]:
            met += ", within the spread"
        ours = f"{row['ours']:.3f} ± {row['spread']:.3f}"
        differences = [row[k] for k in ("lead_over_best_other", "lead_over_bm4d", "published_lead_over_bm4d")]
        cells.append(
            [row["variant"], row["level"], ours, row["seeds"], f"{row['published']:.3f}", row["best_other"]]
            + [f"{x:+.3f}" for x in differences]
            + [met]
        )
    return markdown_table(header, cells) + "\n"


def format_shortfalls(summary: Sequence[dict]) -> str:
    """Rows more than .05 below their published score, and what is known about the reason, as Markdown."""
    cells = []
    for row in summary:
        published = row.get("published")
        if published is not None and row["dice"] < published - 0.05:
            scores = (f"{row['dice']:.3f}", f"{published:.3f}")
            reason = REASONS.get(row["method"], "not known")
            cells.append((row["title"], row["variant"], row["level"], *scores, reason))
    return markdown_table(["method", "variant", "level", "here", "published", "what is known"], cells) + "\n"


def format_labelled(summary: Sequence[dict]) -> str:
    """Ours, without labels, beside the rows that are given labels, as Markdown."""
    ours = {(row["variant"], row["level"]): row["dice"] for row in summary if row["method"] == "ours"}
    cells = []
    for row in summary:
        own = ours.get((row["variant"], row["level"]))
        if row.get("kind") in (SEMI, SUPERVISED) and own is not None:
            scores = (f"{row['dice']:.3f}", f"{own:.3f}", f"{own - row['dice']:+.3f}")
            cells.append((row["variant"], row["level"], row["title"], LABEL_AMOUNTS[row["labels"]], *scores))
    return markdown_table(["variant", "level", "method", "labels", "its score", "ours", "lead of ours"], cells) + "\n"


def format_published() -> str:
    """The paper's figures as Markdown."""
    cells = [(v, title, *(f"{x:.3f}" for x in PUBLISHED_DICE[v, name])) for v, name, title in PUBLISHED_ROWS]
    return markdown_table(["variant", "row", *(f"level {level}" for level in LEVELS)], cells) + "\n"


def write_page(result: dict, docs: Path) -> Path:
    """`tables.md` and its pictures."""
    parts = [
        "# Scores\n",
        "Written by `python -m benchmarks.paper.tables FOLDER` from `benchmarks/results/tables.json`. 20 test volumes "
        "of each variant. The columns kind and labels show which rows are given labels, and how many. ±: sample "
        "standard deviation over seeds. The scores in brackets use one matching of parts for all volumes; they put "
        "k-means at a disadvantage, since its clusters have no order.\n",
        '"Ours" is the recipe `small`: level 1 begins with the consistencies, and all levels are trained on assigned '
        'parts ([Spatial consistency](concepts/spatial-consistency.md)). "Consistencies alone" is the recipe '
        '`small-consistency`, without assigned parts; λ = 0 removes one term of its loss, and "stage" rows replace its '
        "decoder stages at every level. Both start twice and continue from the start with the lower loss. With λf = 0 "
        "the first training, which uses features only, does not take place, while the teacher's clean prediction is "
        'still used. "K-means in space" is the assignment step without any training. All these are nested: each level '
        "divides the parts of the level before.\n",
        "Ours was trained on an H100 GPU, six trainings at once, up to some point of level 2, and on busy CPU cores "
        "from there; all other rows on CPU cores. Its training seconds are not comparable. The methods of other papers "
        "use their preset `small`, minutes of training on two CPU cores for each variant and level; their published "
        "scores come from longer trainings on the paper's own volumes. This holds for methods that are given labels, "
        'too: Jiang et al. is no upper bound at this size. "Our network trained on all labels" is one for ours: the '
        "same network, nested, with the true parts in place of the assigned ones (one seed).\n",
        '"Eq. 4 as written" uses the losses and the training of the paper (flat, fresh noise at every step, '
        "dropout, the epoch of highest confidence, learning rate 3e-4) at the small size, with one start. In all "
        "else the training is that of the preset `small`: batches of one volume, instance norm, a one-cycle "
        "schedule whose maximum is that learning rate, and 1,200 steps per level, which are 15 epochs instead of "
        "the paper's 100.\n",
    ]
    (docs / "tables").mkdir(parents=True, exist_ok=True)
    for number, summary in result["tables"].items():
        parts += [f"## Table {number}\n", format_table(summary), f"\n![Table {number}](tables/table-{number}.png)\n"]
        plot_table(docs / "tables" / f"table-{number}.png", summary)
    hours = sum(row["training_seconds"] for row in result["rows"]) / 3600
    parts += [f"All trainings of these rows took {hours:.1f} hours, most of them on two CPU cores that were shared.\n"]
    if result["missing"]:
        parts += ["Not measured yet: " + ", ".join(result["missing"]) + ".\n"]
    first = result["tables"].get(1, [])
    parts += [
        "## The lead\n",
        "The target is the lead of the paper's method over the paper's BM4D + k-means. It is met if ours leads both "
        "BM4D + k-means and the best other row without labels by at least as much, and missed otherwise.\n",
        format_leads(result["leads"]),
        "\n## Beside methods that are given labels\n",
    ]
    parts += [format_labelled(first), "\n## Further below the published score than .05\n", format_shortfalls(first)]
    parts += ["\n## Published\n", "On the paper's own volumes.\n", format_published()]
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
    target, docs = RESULTS / "tables.json", DOCS
    table = PaperTable(options.folder, teacher=options.teacher)
    if options.reuse and target.exists():
        take_over(table, read_json(target)["rows"])
    rows = collect(table, fill=not options.have)
    summaries = {number: mean_over_seeds(found) for number, found in rows.items()}
    result = {
        "command": "python -m benchmarks.paper.tables FOLDER" + f" --teacher {options.teacher}" * bool(options.teacher),
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
