"""Resumable benchmark tables of methods x levels x variants x seeds on synthetic cells."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from diffdiscover3d.baselines.supervision import LimitedLabels
from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.evaluation.memory_use import PeakMemory
from diffdiscover3d.evaluation.methods import METHODS, Method, make_baseline, preset_of
from diffdiscover3d.evaluation.published import published_dice
from diffdiscover3d.evaluation.synthetic import score
from diffdiscover3d.reporting.score_tables import plot_table, write_table
from diffdiscover3d.training.fingerprints import weights_fingerprint
from diffdiscover3d.training.recipes import RECIPES, Recipe, Training, diffusion_training, train_level
from diffdiscover3d.utils.files import read_record, write_json
from diffdiscover3d.utils.provenance import describe_environment, weights_sha256

TABLES: dict[int, tuple[str, ...]] = {
    1: tuple(name for name in METHODS if not name.startswith("stage-") and name not in ("supervised", "aucseg")),
    2: ("stage-1", "stage-2", "stage-3"),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    variant: str
    method: str
    level: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.method}-level{self.level}-seed{self.seed}"


class PaperTable:
    """Computes the cells of a table, reusing earlier results in the output folder.

    Args:
        output: output folder for `models/`, a JSON file for each cell in `cells/`, and the tables.
        recipe: name of the recipe.
        split: split to evaluate.
        teacher: folder or name of a diffusion model; default: train one for each variant.
        overrides: options that override the recipe in every discovery training.
        diffusion_overrides: options that override the recipe in diffusion pretraining.
        run_training: called with the arguments of a training; default: run it in a separate process.
        med3d: file or Hub id of MedicalNet's weights, for the methods that use them.
        device: device for baselines.
    """

    def __init__(
        self,
        output: str | Path,
        recipe: str = "small",
        split: str = "test",
        teacher: str | None = None,
        overrides: dict | None = None,
        diffusion_overrides: dict | None = None,
        run_training: Callable[[list[str]], None] | None = None,
        med3d: str | None = None,
        device: str = "cpu",
    ):
        if recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {tuple(RECIPES)}, got {recipe!r}.")
        self.output, self.recipe, self.split, self.teacher = Path(output), recipe, split, teacher
        self.overrides, self.diffusion_overrides = overrides or {}, diffusion_overrides or {}
        self.run_training = run_training or run_in_process
        self.med3d, self.device = med3d, device
        self.settings = {
            "recipe": recipe,
            "split": split,
            "teacher": teacher,
            "generator_version": GENERATOR_VERSION,
            "options": self.overrides,
            "diffusion_options": self.diffusion_overrides,
        }

    def fill(self, cell: Cell) -> dict:
        """Compute the row of a cell, or read it from an earlier run with the same settings.

        Raises:
            ModelError: if the folder contains results of different settings, or a training fails.
        """
        path, method = self.output / "cells" / f"{cell.name}.json", METHODS[cell.method]
        settings = self.settings_of(method)
        if path.exists():
            row = read_record(path, "settings", "variant", "level", "dice")
            if row["settings"] != settings:
                raise ModelError(
                    f"{path}: created with different settings ({row['settings']}); choose another --output."
                )
            return row
        commands, seconds = [], 0.0
        with PeakMemory() as memory:
            if method.baseline is None:
                folder, commands, seconds = self._train(cell, method)
                predict, sources = _predictor(folder), {"network": weights_sha256(folder)}
            else:
                predict, seconds = self._fit(cell, method)
                sources = {}
            scores = score(predict, load_volumes(f"synthetic-{cell.variant}", self.split), cell.level)
        row = {
            "method": cell.method,
            "title": method.title,
            "kind": method.kind,
            "labels": method.labels,
            "variant": cell.variant,
            "level": cell.level,
            "parts": LEVEL_PARTS[cell.level],
            "seed": cell.seed,
            **scores,
            "published": published_dice(cell.method, cell.variant, cell.level),
            "training_seconds": round(seconds, 3),
            "peak_memory_mib": memory.peak_mib,
            "commands": commands,
            "weights_sha256": sources,
            "settings": settings,
            "environment": describe_environment(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, row)
        return row

    def _fit(self, cell: Cell, method: Method) -> tuple[Callable, float]:
        """Fit a baseline to the training volumes with the labels it is allowed; return what predicts, and seconds."""
        teacher = _load_teacher(self.teacher_of(cell.variant)) if method.needs_teacher else None
        baseline = make_baseline(
            method, LEVEL_PARTS[cell.level], cell.seed, teacher, preset_of(self.recipe), self.device, self.med3d
        )
        true = load_volumes(f"synthetic-{cell.variant}", "train")
        volumes = LimitedLabels(true, lambda i: true[i]["labels"][cell.level - 1], method.labels, cell.seed)
        if not method.trained:
            baseline.fit(volumes)
            return baseline.predict, 0.0
        baseline.fit(volumes, self.output / "models" / cell.variant / f"{cell.method}-seed{cell.seed}")
        return baseline.predict, baseline.training_seconds

    def settings_of(self, method: Method) -> dict:
        """The settings of a row, which must match for results to be reused."""
        trained = {} if method.baseline else {"recipe_sha256": self._recipe(method).digest()}
        if method.trained:
            preset = preset_of(self.recipe)
            trained = {"preset": method.baseline.hyper_parameters(preset), "labels": method.labels}
        if method.needs_med3d:
            trained["med3d"] = self.med3d
        return {**self.settings, **trained, **(self._teacher_settings if method.needs_teacher else {})}

    @cached_property
    def _teacher_settings(self) -> dict:
        """Identifies the diffusion model by its weights, or by the options of its training."""
        if self.teacher is None:
            return {"diffusion": {**RECIPES[self.recipe].diffusion, **self.diffusion_overrides}}
        return {"teacher_sha256": weights_fingerprint(_load_teacher(self.teacher).unet)}

    def _recipe(self, method: Method) -> Recipe:
        name = f"{self.recipe}-{method.recipe}" if method.recipe else self.recipe
        if method.recipe == "as-written":
            name = name if name in RECIPES else self.recipe  # that of the paper is as written
        if name not in RECIPES:
            raise ModelError(f"{method.title}: there is no recipe {name!r}; choose another --recipe or row.")
        return RECIPES[name].changed(**method.options, **self.overrides)

    def teacher_of(self, variant: str) -> str:
        """The diffusion model of a variant, trained if necessary, with seed 0."""
        if self.teacher is not None:
            return self.teacher
        folder = self.output / "models" / variant / "diffusion"
        recipe = RECIPES[self.recipe]
        options = {**recipe.diffusion, **self.diffusion_overrides}
        self._run(diffusion_training(Recipe(options, {}, False), f"synthetic-{variant}", 0, folder))
        return str(folder)

    def _train(self, cell: Cell, method: Method) -> tuple[Path, list[str], float]:
        """Train the network of a cell; return its folder, and the commands and training seconds of its level."""
        recipe, base = self._recipe(method), self.output / "models" / cell.variant / f"{cell.method}-seed{cell.seed}"
        parent = None
        if recipe.nested and cell.level > 1:
            parent, *_ = self._train(Cell(cell.variant, cell.method, cell.level - 1, cell.seed), method)
        seconds = []
        trainings = train_level(
            recipe,
            cell.level,
            f"synthetic-{cell.variant}",
            cell.seed,
            self.teacher_of(cell.variant),
            parent,
            base / f"level{cell.level}",
            lambda training: seconds.append(self._run(training)),
        )
        commands = [self._strip_output_folder(t.arguments()) for t in trainings]
        return trainings[-1].folder, commands, sum(seconds)

    def _run(self, training: Training) -> float:
        """Run a training unless it has finished before; return its duration in seconds."""
        record, clock = training.folder / "benchmark.json", time.perf_counter()
        arguments = training.arguments()
        command = self._strip_output_folder(arguments)
        if record.exists():
            done = read_record(record, "command", "seconds")
            if done["command"] != command:
                raise ModelError(
                    f"{record}: trained with different options ({done['command']}); choose another --output."
                )
            return done["seconds"]
        if (training.folder / "checkpoints").exists():
            arguments += ["--resume", "latest"]
        self.run_training(arguments)
        seconds = round(time.perf_counter() - clock, 1)
        write_json(record, {"seconds": seconds, "resumed": "--resume" in arguments, "command": command})
        return seconds

    def _strip_output_folder(self, arguments: Sequence[str]) -> str:
        """A command line without the output folder: local paths are stripped."""
        prefix = f"{self.output}/"
        return " ".join(word.removeprefix(prefix) for word in map(str, arguments))


def run_in_process(arguments: Sequence[str]) -> None:
    """Run a training in a separate process, isolated from other trainings."""
    command = [sys.executable, "-m", "diffdiscover3d.train", *arguments]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise ModelError(f"a training ended with exit code {code}: {' '.join(command[1:])}")


def benchmark(
    output: str | Path,
    methods: Sequence[str],
    variants: Sequence[str] = ("regular", "irregular"),
    levels: Sequence[int] = (1, 2, 3),
    seeds: Sequence[int] = (0,),
    on_row: Callable[[dict, int, int], None] | None = None,
    **options,
) -> dict:
    """Evaluate methods over variants, levels and seeds; write `table.json`, `table.md` and `table.png`.

    After an interruption, call again with the same arguments to resume.

    Args:
        output: folder for models, metrics and tables.
        methods: names from `METHODS`.
        variants: variants of the synthetic cells.
        levels: levels of the hierarchy.
        seeds: random seeds.
        on_row: progress callback, called with each row of scores, its number and the number of rows.
        **options: options of [`PaperTable`].

    Returns:
        `rows`, one for each method, variant, level and seed; `summary` with mean and standard deviation over seeds; and
        `missing`, the methods left out because MedicalNet's weights are not given.

    Raises:
        InputError: if a method or variant is unknown.
        ModelError: as for [`PaperTable.fill`].
    """
    unknown = sorted(set(methods) - set(METHODS)) + sorted(set(variants) - {"regular", "irregular"})
    if unknown:
        raise InputError(f"unknown: {', '.join(unknown)}; methods are {', '.join(METHODS)}.")
    table = PaperTable(output, **options)
    missing = [] if table.med3d else [name for name in methods if METHODS[name].needs_med3d]
    cells = [
        Cell(variant, method, level, seed)
        for seed in seeds
        for variant in variants
        for method in methods
        if method not in missing
        for level in levels
    ]
    rows = []
    for number, cell in enumerate(cells, start=1):
        rows.append(table.fill(cell))
        if on_row:
            on_row(rows[-1], number, len(cells))
    result = {"settings": table.settings, "summary": mean_over_seeds(rows), "missing": missing, "rows": rows}
    write_json(table.output / "table.json", result)
    write_table(table.output / "table.md", result["summary"])
    plot_table(table.output / "table.png", result["summary"])
    return result


def mean_over_seeds(rows: Iterable[dict]) -> list[dict]:
    """Mean and sample standard deviation over seeds of each method, variant and level, in the order of the rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["method"], row["level"]), []).append(row)
    summary = []
    for (variant, method, level), group in groups.items():
        dice = np.array([row["dice"] for row in group])
        one = np.array([row["dice_one_matching"] for row in group])
        summary.append(
            {
                "variant": variant,
                "method": method,
                "title": group[0]["title"],
                "level": level,
                "seeds": [row["seed"] for row in group],
                "dice": float(dice.mean()),
                "dice_spread": float(dice.std(ddof=1)) if len(dice) > 1 else 0.0,
                "dice_one_matching": float(one.mean()),
                "seconds": float(np.mean([row["seconds"] for row in group])),
                "training_seconds": float(np.mean([row["training_seconds"] for row in group])),
                "kind": METHODS[method].kind,
                "labels": METHODS[method].labels,
                "published": published_dice(method, variant, level),
                "peak_memory_mib": max((row.get("peak_memory_mib") or 0.0 for row in group), default=0.0) or None,
            }
        )
    return summary


def _predictor(folder: Path) -> Callable:
    from diffdiscover3d.hub.registry import load_discovery

    network = load_discovery(str(folder))
    return lambda volume: network.segment(volume[None]).labels[0].numpy()


def _load_teacher(source: str):
    from diffdiscover3d.hub.registry import load_teacher

    return load_teacher(source)
