"""Resumable reproduction of Table 3: baselines trained and scored on a BraTS folder, next to given models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from diffdiscover3d.baselines.supervision import LimitedLabels
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.evaluation.brats import NUM_PARTS, evaluate_brats, score_brats
from diffdiscover3d.evaluation.memory_use import PeakMemory
from diffdiscover3d.evaluation.paper_methods import METHODS, TABLES, make_baseline, preset_of, published_brats
from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.reporting.score_tables import LABEL_AMOUNTS
from diffdiscover3d.utils.files import atomic_file, read_json, write_json
from diffdiscover3d.utils.provenance import describe_environment


def brats_table(
    output: str | Path,
    root: str | Path,
    methods: Sequence[str] = TABLES[3],
    models: Mapping[str, str] | None = None,
    teacher: str | None = None,
    med3d: str | None = None,
    recipe: str = "small",
    split: str = "test",
    seed: int = 0,
    options: BraTSOptions | None = None,
    device: str = "cpu",
    progress_callback: Callable[[dict, int, int], None] | None = None,
) -> dict:
    """Train baselines on the training cases of a BraTS folder and score them; write `table.json` and `table.md`.

    After an interruption, call again with the same arguments to resume.

    Args:
        output: folder for checkpoints (`models/`), a JSON file for each row (`cells/`) and the table.
        root: folder of a BraTS edition; all cases of the split need a mask, and those of the training split for
            supervised methods.
        methods: names from `TABLES[3]`.
        models: for each row's name a folder, Hub id or embedded discovery network; use the titles of `METHODS` ("ours",
            "ours, λv = 0") to get the published scores next to them.
        teacher: diffusion model for k-means on its features; without it that row is missing.
        med3d: file or Hub id of MedicalNet's weights; without it the rows that need it are missing.
        recipe: "paper" selects the published hyper-parameters of the baselines, others the small ones.
        split: split to evaluate.
        seed: of the trainings and clusterings.
        options: how the volumes are prepared.
        device: device for networks.
        progress_callback: called with each row, its number and the number of rows.

    Returns:
        `rows` (raw and post-processed scores of each method, `published` Dice and HD95, kind, labels, seconds, memory)
        and `missing`, the methods left out for lack of weights.

    Raises:
        InputError: if a method is not in Table 3, or a case has no mask.
        ModelError: if the folder holds rows of other settings, or a model cannot be loaded.
    """
    unknown = sorted(set(methods) - set(TABLES[3]))
    if unknown:
        raise InputError(f"unknown: {', '.join(unknown)}; methods of table 3 are {', '.join(TABLES[3])}.")
    options, output = options or BraTSOptions(), Path(output)
    train, scored = BraTSVolumes(root, "train", options), BraTSVolumes(root, split, options)
    scored.require_masks()
    missing = [
        name
        for name in methods
        if (METHODS[name].needs_med3d and med3d is None) or (METHODS[name].needs_teacher and teacher is None)
    ]
    present = [name for name in methods if name not in missing]
    shared = {
        "training": train.fingerprint(),
        "scored": scored.fingerprint(),
        "seed": seed,
    }
    rows, total = [], len(present) + len(models or {})
    for name in present:
        settings = {**shared, "preset": preset_of(recipe), "teacher": teacher, "med3d": med3d}
        row = _cached(
            output / "cells" / f"brats-{name}-seed{seed}.json",
            settings,
            lambda n=name: _score_method(n, train, scored, output, teacher, med3d, recipe, seed, device),
        )
        rows.append(row)
        if progress_callback:
            progress_callback(row, len(rows), total)
    for title, source in (models or {}).items():
        row = _score_model(title, source, root, split, options, seed, device)
        rows.append(row)
        if progress_callback:
            progress_callback(row, len(rows), total)
    result = {"settings": {**shared, "recipe": recipe}, "missing": missing, "rows": rows}
    write_json(output / "table.json", result)
    with atomic_file(output / "table.md") as temporary:
        temporary.write_text(format_brats_table(rows), encoding="utf-8")
    return result


def format_brats_table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table."""
    header = ["method", "Dice WT", "HD95 (mm)", "post-processed: Dice", "HD95 (mm)", "published Dice", "HD95 (mm)"]
    header += ["kind", "labels", "training (s)", "memory (MiB)"]
    table = []
    for row in rows:
        scores = [row[kind] for kind in ("raw", "postprocessed")]
        published = row["published"] or (None, None)
        table.append(
            (
                row["title"],
                *(text for s in scores for text in (f"{s['dice']:.3f}", f"{s['hd95_mm']:.1f}")),
                *("" if value is None else str(value) for value in published),
                row["kind"],
                LABEL_AMOUNTS[row["labels"]],
                "" if row["training_seconds"] is None else f"{row['training_seconds']:.0f}",
                f"{row['peak_memory_mib']:.0f}",
            )
        )
    return markdown_table(header, table) + "\n"


def _cached(path: Path, settings: dict, make: Callable[[], dict]) -> dict:
    if path.exists():
        row = read_json(path)
        if row["settings"] != settings:
            raise ModelError(f"{path}: created with different settings ({row['settings']}); choose another --output.")
        return row
    row = {**make(), "settings": settings, "environment": describe_environment()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    return row


def _score_method(name, train, scored, output, teacher, med3d, recipe, seed, device) -> dict:
    method = METHODS[name]
    if method.labels != "none":
        train.require_masks()
    volumes = LimitedLabels(train, lambda i: torch.from_numpy(train.crop(train.true_parts(i))), method.labels, seed)
    with PeakMemory() as memory:
        loaded = None
        if method.needs_teacher:
            from diffdiscover3d.hub.registry import load_teacher

            loaded = load_teacher(teacher).to(device)
        baseline = make_baseline(method, NUM_PARTS, seed, loaded, preset_of(recipe), device, med3d)
        if method.trained:
            baseline.fit(volumes, output / "models" / f"{name}-seed{seed}")
        else:
            baseline.fit(volumes)
        (raw, post), cases = score_brats(baseline.predict, scored, NUM_PARTS)
    return {
        "method": name,
        "title": method.title,
        "kind": method.kind,
        "labels": method.labels,
        "raw": raw,
        "postprocessed": post,
        "published": published_brats(method.title),
        "training_seconds": round(baseline.training_seconds, 1) if method.trained else 0.0,
        "peak_memory_mib": memory.peak_mib,
        "cases": cases,
    }


def _score_model(title, source, root, split, options, seed, device) -> dict:
    """The row of a discovery network trained elsewhere, whose time of training is not known here."""
    with PeakMemory() as memory:
        found = evaluate_brats(root, {title: source}, split, options, kmeans=False, seed=seed, device=device)
    raw, post = found["rows"]
    return {
        "method": title,
        "title": title,
        "kind": "unsupervised",
        "labels": "none",
        "raw": raw,
        "postprocessed": post,
        "published": published_brats(title),
        "training_seconds": None,
        "peak_memory_mib": memory.peak_mib,
        "cases": found["cases"][title],
        "weights_sha256": found["weights_sha256"],
    }
