"""Write docs/speed.md and its pictures from `benchmarks/results/speed-*.json`: python -m benchmarks.speed.report."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import DOCS, RESULTS
from benchmarks.speed.gpu_report import gpu_section
from benchmarks.speed.run import BENCHMARKS
from benchmarks.speed.timing import module_of
from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.utils.files import atomic_file

TITLES = {
    "loss": "Region consistency, forward and backward",
    "features": "Diffusion features of a stage",
    "diffusion-step": "A step of diffusion pretraining",
    "discovery-step": "A step of structure discovery",
    "segment-cost": "Segmenting a scan",
    "scaling": "Two processes",
    "compiled": "torch.compile",
}
BUDGET_HEADER = ["part", "ms", "least ms", "share of roofline", "GFLOP", "GB"]
INTRODUCTION = """# Speed

Written by `python -m benchmarks.speed.report` from `benchmarks/results/speed-*.json`, which
`python -m benchmarks.speed.run` measures. The implementations of a row are timed in turns in one process. A ratio is
the ratio of the medians, followed by the quartiles of the ratios within the rounds. Peak memory is measured above the
inputs, in one process per implementation. The baselines (`benchmarks/speed/baselines.py`) compute the same numbers or
have the same widths; the docstring of each script describes its comparison.
"""


def load_results(folder: Path) -> list[dict]:
    """All results of a folder, those of the CPU first."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("speed-*.json"))]
    return sorted(found, key=lambda result: result["device"] != "cpu")


def write_report(results: Path, docs: Path, benchmarks: Iterable[str]) -> Path:
    """Write the page and its pictures.

    Args:
        results: folder of the JSON files.
        docs: folder of `speed.md` and `speed/`.
        benchmarks: names in the order of the page; the page gives the command of those without a result.
    """
    found = load_results(results)
    pictures = docs / "speed"
    text = [INTRODUCTION]
    for device in dict.fromkeys(["cpu", *(r["device"] for r in found)]):
        there = {r["name"]: r for r in found if r["device"] == device}
        text.append(f"## {describe_machine(there) or device.upper()}\n")
        if save_ratios(pictures / f"ratios-{device}.png", there.values()):
            text.append(f"![Ratios to the baselines](speed/ratios-{device}.png)\n")
        for name in benchmarks:
            if name not in there:
                if device == "cpu":  # other machines show what was measured on them
                    text.append(f"*{TITLES.get(name, name)}: not measured yet (`python -m {module_of(name)}`).*\n")
            elif name == "budget":
                text.append(budget_section(there[name], device))
                if save_budget(pictures / f"budget-{device}.png", there[name]):
                    text.append(f"![Budget](speed/budget-{device}.png)\n")
            else:
                text.append(section(there[name]))
                if name == "segment-cost":
                    save_costs(pictures / f"cost-per-voxel-{device}.png", there[name]["details"]["costs"])
                    text.append(f"![Cost of a voxel](speed/cost-per-voxel-{device}.png)\n")
    text.append(gpu_section(results))
    page = docs / "speed.md"
    with atomic_file(page) as temporary:
        temporary.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    return page


def describe_machine(results: Mapping[str, dict]) -> str:
    """The device of the results, with the software that decides about speed."""
    for result in results.values():
        e = result["environment"]
        place = f"CPU, {e['cpu_cores']} cores" if result["device"] == "cpu" else e["gpu"]
        return f"{place} (torch {e['packages']['torch']})"
    return ""


def section(result: dict) -> str:
    """The rows of one benchmark as a table, with the command and the load they were measured under."""
    lines = [f"### {TITLES.get(result['name'], result['name'])}\n"]
    compared = [r for r in result["rows"] if r["measure"] != "absolute"]
    if compared:
        header = ["what", "against", "measure", "ours", "theirs", "ratio", "target", ""]
        lines.append(markdown_table(header, map(compared_cells, compared)))
    absolutes = [r for r in result["rows"] if r["measure"] == "absolute"]
    if absolutes:
        lines.append(markdown_table(["what", "median", "range", "target", ""], map(absolute_cells, absolutes)))
    return "\n".join([*lines, "", footnote(result)])


def compared_cells(row: dict) -> list[str]:
    spread = f" [{row['low']:.2f}, {row['high']:.2f}]" if "low" in row else ""
    target = "" if row["target"] is None else f"at least {row['target']:g}"
    measured = [f"{row[side]:.3g} {row['unit']}" for side in ("ours", "theirs")]
    return [
        row["what"],
        row["baseline"],
        row["measure"],
        *measured,
        f"{row['ratio']:.2f}{spread}",
        target,
        verdict(row),
    ]


def absolute_cells(row: dict) -> list[str]:
    spread = f"{row['low']:.3g} to {row['high']:.3g}"
    target = "" if row["target"] is None else f"at most {row['target']:g}"
    return [row["what"], f"{row['value']:.3g} {row['unit']}", spread, target, verdict(row)]


def verdict(row: dict) -> str:
    return {None: "", True: "met", False: "**missed**"}[row["met"]]


def footnote(result: dict) -> str:
    before, after = result["load_average_before"][0], result["load_average_after"][0]
    trial = " A short trial, not a result." if result["quick"] else ""
    threads = result["environment"]["threads"]
    load = f"load average {before:.1f} before, {after:.1f} after"
    note = f" {result['note']}" if "note" in result else ""
    return f"`{result['command']}`; {threads} thread{'s' * (threads > 1)}, {load}.{trial}{note}\n"


def budget_section(result: dict, device: str) -> str:
    """Peaks, the parts of every computation, the largest gaps, and the estimate of the preset `paper`."""
    details, peaks = result["details"], result["details"]["peaks"]
    rates = [
        (f"{dtype}, {kind}", f"{rate:.0f} GFLOP/s")
        for dtype, found in peaks["gflop_per_second_of"].items()
        for kind, rate in found.items()
    ]
    rates.append(("memory copy", f"{peaks['bytes_per_second'] / 1e9:.1f} GB/s"))
    lines = ["### Budget\n", markdown_table(["peak", ""], rates), ""]
    for name, budget in details["budgets"].items():
        gap = budget["largest_gap"]
        lines += [
            f"**{name}**: {budget['seconds']:.3f} s, {budget['fraction_of_roofline']:.0%} of the roofline; largest "
            f"gap: {gap['part']} ({gap['seconds_above_least']:.3f} s above its least time).\n",
            markdown_table(BUDGET_HEADER, map(budget_cells, budget["parts"])),
        ]
        most = ", ".join(f"`{o['operator']}` {o['share']:.0%}" for o in budget["operators"][:6])
        lines += ["", f"Operators by their own time: {most}.\n"]
    if device == "cpu":
        lines.append(estimate_paragraph(details["paper_recipe"]))
    return "\n".join([*lines, footnote(result)])


def budget_cells(row: dict) -> list[str]:
    times = [f"{1e3 * row[k]:.1f}" for k in ("seconds", "least_seconds")]
    return [row["part"], *times, f"{row['fraction_of_roofline']:.0%}", f"{row['gflop']:.2f}", f"{row['gb']:.2f}"]


def estimate_paragraph(recipe: dict) -> str:
    hours = ", ".join(f"{h:.1f} h at {at}" for at, h in recipe["hours_at_fraction_of_dense_bf16"].items())
    rate = recipe["assumed_dense_bf16_flop_per_second"] / 1e12
    parts = "; ".join(
        f"{name}: {part['steps']:,} steps of {part['flop_of_a_step'] / 1e12:.2f} TFLOP"
        for name, part in recipe["parts"].items()
    )
    return (
        f"**The preset `paper` on a GPU: an estimate, nothing was measured.** {parts}. In all "
        f"{recipe['total_flop']:.2e} operations: {hours} of {rate:.0f} TFLOP/s, the dense bfloat16 rate an "
        "H100 is sold with. The preset trains the diffusion model for 50,000 steps; the paper trains it for 50k "
        "epochs, which are 20 steps each if an epoch is one pass over 80 volumes in batches of 4.\n"
    )


def _figure(rows: int, width: float = 8):
    figure = Figure(figsize=(width, 1.2 + 0.32 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path, suffix=".png") as temporary:
        figure.savefig(temporary, dpi=110)


def save_ratios(path: Path, results: Sequence[dict]) -> bool:
    """Bars of all ratios on a logarithmic axis, with their spread and the targets as ticks."""
    rows = [r for result in results for r in result["rows"] if r["measure"] != "absolute"]
    if not rows:
        return False
    figure, axis = _figure(len(rows), 10)
    for place, row in enumerate(rows):
        colour = {None: "0.6", True: "tab:green", False: "tab:red"}[row["met"]]
        axis.barh(place, row["ratio"] - 1, left=1, color=colour, height=0.6)
        if "low" in row:
            axis.plot([row["low"], row["high"]], [place, place], color="black", linewidth=1.2)
        if row["target"] is not None:
            axis.plot([row["target"]] * 2, [place - 0.4, place + 0.4], color="tab:blue", linewidth=2)
    axis.axvline(1, color="black", linewidth=0.8)
    labels = [f"{r['what']}, {r['measure']}\nagainst {r['baseline']}" for r in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=6)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("theirs / ours (blue: target)")
    _save(figure, path)
    return True


def save_costs(path: Path, costs: Sequence[dict]) -> None:
    """What a voxel costs, and the peak memory, by the size of the volume."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = sorted((c for c in costs if c["ns_per_voxel"] is not None), key=lambda c: c["voxels"])
    sizes = [c["voxels"] for c in rows]
    left.plot(sizes, [c["ns_per_voxel"] for c in rows], "o-", fillstyle="none")
    left.set(ylabel="ns a voxel, beyond starting up", ylim=(0, None))
    right.plot(sizes, [c["peak_gb"] for c in rows], "s-", fillstyle="none")
    right.set(ylabel="peak memory, GB", ylim=(0, None))
    for row in rows:
        label = "×".join(map(str, row["shape"]))
        left.annotate(
            label, (row["voxels"], row["ns_per_voxel"]), fontsize=6, textcoords="offset points", xytext=(3, 4)
        )
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("voxels")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_budget(path: Path, result: dict) -> bool:
    """For every part its seconds, and in dark the least the machine allows."""
    rows = [(f"{name}: {row['part']}", row) for name, b in result["details"]["budgets"].items() for row in b["parts"]]
    if not rows:
        return False
    figure, axis = _figure(len(rows) * 0.7, 9)
    axis.barh(range(len(rows)), [r["seconds"] for _, r in rows], color="0.8", label="measured")
    axis.barh(range(len(rows)), [r["least_seconds"] for _, r in rows], color="tab:blue", height=0.4, label="least")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)
    return True


def main() -> None:
    """Write the page from the committed results, or from those of another folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    options = parser.parse_args()
    print(write_report(options.results, options.docs, BENCHMARKS))


if __name__ == "__main__":
    main()
