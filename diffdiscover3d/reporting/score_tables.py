"""Tables of scores, as Markdown and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.utils.files import atomic_file

_NOTE = "Mean Dice, parts matched in each volume; ±: spread over seeds; in brackets: one matching for all volumes."


LABEL_AMOUNTS = {"none": "none", "slice": "2 % of voxels", "volume": "1 volume", "all": "all"}


def format_table(summary: Sequence[dict]) -> str:
    """Markdown: a table for each variant, a row for each method, a column for each level.

    Args:
        summary: rows with variant, title, level, seeds, dice, dice_spread and dice_one_matching; where a row has them
            also published, kind, labels, training_seconds and peak_memory_mib.
    """
    levels = sorted({row["level"] for row in summary})
    header = ["method", *(f"level {n}" for n in levels), "published", "kind", "labels", "training (s)", "memory (MiB)"]
    blocks = []
    for variant in dict.fromkeys(row["variant"] for row in summary):
        found = [row for row in summary if row["variant"] == variant]
        cells = {(row["title"], row["level"]): row for row in found}
        titles = dict.fromkeys(row["title"] for row in found)
        table = []
        for title in titles:
            of_title = [cells.get((title, level)) for level in levels]
            table.append((title, *map(_cell, of_title), *_details(of_title)))
        blocks.append(f"**{variant}**\n\n{markdown_table(header, table)}")
    return "\n\n".join([*blocks, _NOTE]) + "\n"


def write_table(target: Path, summary: Sequence[dict]) -> None:
    """Write [`format_table`] to a file."""
    with atomic_file(target) as temporary:
        temporary.write_text(format_table(summary), encoding="utf-8")


def plot_table(target: Path, summary: Sequence[dict]) -> None:
    """Bars of the Dice of each method at each level, a panel per variant, error bars for the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    variants = list(dict.fromkeys(row["variant"] for row in summary))
    titles = list(dict.fromkeys(row["title"] for row in summary))
    levels = sorted({row["level"] for row in summary})
    figure, axes = plt.subplots(1, len(variants), figsize=(1.5 + 5 * len(variants), 4), squeeze=False, sharey=True)
    colours = {title: plt.get_cmap("tab20")(i) for i, title in enumerate(titles)}
    handles = {}
    for axis, variant in zip(axes[0], variants, strict=True):
        here = list(dict.fromkeys(row["title"] for row in summary if row["variant"] == variant))
        width = 0.8 / len(here)
        for i, title in enumerate(here):
            found = {r["level"]: r for r in summary if r["variant"] == variant and r["title"] == title}
            heights = [found[n]["dice"] if n in found else np.nan for n in levels]
            # NaN draws no error bar: one seed has no spread
            spreads = [found[n]["dice_spread"] if n in found and len(found[n]["seeds"]) > 1 else np.nan for n in levels]
            places = np.arange(len(levels)) + (i - (len(here) - 1) / 2) * width
            handles[title] = axis.bar(places, heights, width, yerr=spreads, color=colours[title], capsize=1.5)
        axis.set_title(variant)
        axis.set_xticks(range(len(levels)), [f"level {n}" for n in levels])
        axis.set_ylim(0, 1)
    axes[0][0].set_ylabel("Dice")
    figure.legend([handles[title] for title in titles], titles, loc="outside right upper", fontsize=8, frameon=False)
    figure.set_layout_engine("constrained")
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _details(rows: Sequence[dict | None]) -> tuple[str, ...]:
    """Published scores, kind, labels, and the largest cost of a level."""
    there = [row for row in rows if row is not None]
    published = [f"{row['published']:.3f}" if row and row.get("published") is not None else "" for row in rows]
    memory = max((row.get("peak_memory_mib") or 0 for row in there), default=0)
    seconds = max(row.get("training_seconds") or 0 for row in there)
    return (
        " / ".join(published) if any(published) else "",
        there[0].get("kind") or "",
        LABEL_AMOUNTS.get(there[0].get("labels"), ""),
        f"{seconds:.0f}",
        f"{memory:.0f}" if memory else "",
    )


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    spread = f" ± {row['dice_spread']:.3f}" if len(row["seeds"]) > 1 else ""
    return f"{row['dice']:.3f}{spread} ({row['dice_one_matching']:.3f})"
