"""Loss curves, Dice bars and principal components of features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffdiscover3d.reporting.colours import part_rgb
from diffdiscover3d.utils.files import atomic_file, read_log

_NOT_LOSSES = ("step", "lr", "confidence")


def save_loss_curves(path: str | Path, log: str | Path) -> None:
    """Write a PNG of the losses in a training's `log.jsonl`, and of the mean confidence where it was measured.

    Args:
        path: the PNG to write; nothing is written if the log has no line.
        log: JSON lines with "step" and metrics; an incomplete last line is skipped.
    """
    rows = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in read_log(Path(log))]
    if not rows:
        return
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in _NOT_LOSSES]
    confident = any("confidence" in row for row in rows)
    figure = Figure(figsize=(6 * (1 + confident), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + confident, squeeze=False)[0]
    for number, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        style = (
            {"color": "black", "linewidth": 1.8} if name == "loss" else {"color": part_rgb(number), "linewidth": 1.2}
        )
        axes[0].plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "", **style)
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, fontsize=8)
    if confident:
        points = [(row["step"], row["confidence"]) for row in rows if "confidence" in row]
        axes[1].plot(*zip(*points, strict=True), color=part_rgb(5), marker="." if len(points) < 30 else "")
        axes[1].set_ylabel("mean confidence")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_dice_bars(path: str | Path, rows: Sequence[dict]) -> None:
    """Write a PNG with a group of bars per level: mean Dice of each method, and its spread over volumes as error bar.

    Args:
        rows: dicts with "level", "parts", "method", "dice" and "dice_std", as [`evaluate`] returns them.
    """
    levels = sorted({row["level"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    parts = {row["level"]: row["parts"] for row in rows}
    figure = Figure(figsize=(1.5 + 1.7 * len(levels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        own = {row["level"]: row for row in rows if row["method"] == method}
        places = [i + (number - (len(methods) - 1) / 2) * width for i, level in enumerate(levels) if level in own]
        found = [own[level] for level in levels if level in own]
        bars = axis.bar(
            places,
            [row["dice"] for row in found],
            width * 0.92,
            yerr=[row["dice_std"] for row in found],
            color=part_rgb(5 if number == 0 else number),
            label=method,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axis.set_xticks(range(len(levels)), [f"level {level}\n{parts[level]} parts" for level in levels])
    axis.set_ylim(0, 1.1)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_ylabel("Dice")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(methods), frameon=False, fontsize=8)
    _save(figure, path)


def components_as_rgb(features: np.ndarray) -> np.ndarray:
    """The first three principal components of a feature map as red, green and blue.

    Args:
        features: (C, h, w, d) with at least one channel.

    Returns:
        (3, h, w, d) in [0, 1], each component spread between its 1st and 99th percentile. The sign of a
        component is chosen so that its largest weight is positive. Missing components are 0.5.
    """
    channels = features.reshape(len(features), -1).astype(np.float64)
    centred = channels - channels.mean(axis=1, keepdims=True)
    variances, directions = np.linalg.eigh(centred @ centred.T)
    rgb = np.full((3, centred.shape[1]), 0.5)
    for place, index in enumerate(np.argsort(variances)[::-1][:3]):
        direction = directions[:, index]
        values = centred.T @ (direction * np.sign(direction[np.abs(direction).argmax()]))
        low, high = np.percentile(values, (1, 99))
        if high > low:
            rgb[place] = np.clip((values - low) / (high - low), 0, 1)
    return rgb.reshape(3, *features.shape[1:])


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_file(path, suffix=".png") as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": "diffdiscover3d"})
