"""Tables of scores, as Markdown and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.utils.files import atomic_file, write_text

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
    write_text(target, format_table(summary))


def plot_table(target: Path, summary: Sequence[dict]) -> None:
    """Bars of the Dice of each method: a panel for each level, a row for each method, a colour for each variant.

    Error bars show the spread over seeds, ticks the published score, hatched bars methods that are given labels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    variants = list(dict.fromkeys(row["variant"] for row in summary))
    titles = list(dict.fromkeys(row["title"] for row in summary))
    levels = sorted({row["level"] for row in summary})
    colours = {variant: plt.get_cmap("Set2")(i) for i, variant in enumerate(variants)}
    size = (3.5 + 2.2 * len(levels), 1.3 + 0.28 * len(titles))
    figure, axes = plt.subplots(1, len(levels), figsize=size, squeeze=False, sharey=True)
    thick = 0.8 / len(variants)
    for axis, level in zip(axes[0], levels, strict=True):
        for row in (row for row in summary if row["level"] == level):
            y = titles.index(row["title"]) + (variants.index(row["variant"]) - (len(variants) - 1) / 2) * thick
            spread = row["dice_spread"] if len(row["seeds"]) > 1 else None
            hatch = None if row.get("labels", "none") == "none" else "////"
            colour = colours[row["variant"]]
            axis.barh(y, row["dice"], thick, xerr=spread, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            if row.get("published") is not None:
                axis.plot([row["published"]] * 2, [y - thick / 2, y + thick / 2], color="black", linewidth=1)
        axis.set_title(f"level {level}", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_xlabel("Dice", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(titles)), titles)
    axes[0][0].set_ylim(len(titles) - 0.5, -0.5)
    handles = [Patch(color=colours[variant], label=variant) for variant in variants]
    if any(row.get("labels", "none") != "none" for row in summary):
        handles.append(Patch(facecolor="grey", edgecolor="white", hatch="////", label="given labels"))
    if any(row.get("published") is not None for row in summary):
        handles.append(Line2D([], [], color="black", linewidth=1, label="published, other volumes"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.set_layout_engine("constrained")
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
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
