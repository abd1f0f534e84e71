"""Table 3 of the paper on the folder of any BraTS edition, by one command that can be interrupted."""

import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from diffdiscover3d.baselines.supervision import LimitedLabels
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError, ModelError, NetworkError
from diffdiscover3d.evaluation.brats import NUM_PARTS, score_brats
from diffdiscover3d.evaluation.memory_use import PeakMemory
from diffdiscover3d.evaluation.methods import METHODS, UNSUPERVISED, make_baseline, preset_of
from diffdiscover3d.evaluation.published import published_brats
from diffdiscover3d.hub.registry import embedded_models, load_discovery, load_teacher
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.reporting.score_tables import LABEL_AMOUNTS
from diffdiscover3d.training.recipes import Training
from diffdiscover3d.utils.files import read_record, write_json, write_text
from diffdiscover3d.utils.provenance import describe_environment, weights_sha256

logger = logging.getLogger("diffdiscover3d")


@dataclass(frozen=True)
class TrainedRow:
    """A network trained on the folder's training cases; `options` change the discovery's."""

    title: str
    options: dict = field(default_factory=dict)


TRAINED = {
    "ours": TrainedRow("ours"),
    "no-invariance": TrainedRow("ours, λinv = 0", {"lambda_invariance": 0.0}),
    "no-feature": TrainedRow("ours, λf = 0", {"lambda_feature": 0.0}),
    "no-visual": TrainedRow("ours, λv = 0", {"lambda_visual": 0.0}),
}
# rows of published models, and of baselines as `METHODS` has them
EMBEDDED = ("brain-flair",)
BASELINES = (
    "jiang", "nalepa", "iic", "jule", "hsu", "med3d", "k-means", "features-k-means-2", "med3d-k-means", "aucseg",
)  # fmt: skip
# options of the two trainings: "paper" as in the paper, "small" for two CPU cores
RECIPES: dict[str, tuple[dict, dict]] = {
    "paper": ({"preset": "brats"}, {"preset": "brats"}),
    "small": (
        {"preset": "small", "sample_size": (48,)},
        {"preset": "small", "num_parts": NUM_PARTS, "stages": (2,), "volume_size": (96, 96, 80)},
    ),
}


def table3_rows() -> tuple[str, ...]:
    """The rows that can be filled, in the table's order."""
    return (
        *TRAINED,
        *(name for name in EMBEDDED if name in embedded_models()),
        *BASELINES,
    )


class BraTSTable:
    """Fills Table 3 row by row, each from what is already in the output folder.

    Args:
        root: the folder of a BraTS edition, in any of its layouts.
        output: folder for everything: `models/`, a JSON file for each row in `rows/`, and the table.
        options: modality, crop and so on, for training and scoring alike.
        split: which cases are scored; "all" for rows that are not trained on the folder.
        recipe: how networks are trained, "paper" or "small".
        seed: of the trainings and baselines.
        device: for networks that are scored.
        launcher: command that starts a training, such as "accelerate launch --num_processes 8 -m"; default: this
            Python's `-m`.
        diffusion_options, discovery_options: replace the recipe's.
        med3d: file or Hub id of MedicalNet's weights, for the rows that use them.

    Raises:
        InputError: if there are no cases, or one to be scored has no mask.
        ValueError: for an unknown recipe or split.
    """

    def __init__(
        self,
        root: str | Path,
        output: str | Path,
        options: BraTSOptions | None = None,
        split: str = "test",
        recipe: str = "paper",
        seed: int = 0,
        device: str | torch.device = "cpu",
        launcher: str = "",
        diffusion_options: dict | None = None,
        discovery_options: dict | None = None,
        med3d: str | None = None,
    ):
        if recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {tuple(RECIPES)}, got {recipe!r}.")
        self.root, self.output, self.split = str(root), Path(output), split
        self.options, self.seed, self.device, self.launcher = options or BraTSOptions(), seed, device, launcher
        self.preset, self.med3d = preset_of(recipe), med3d
        diffusion, discovery = RECIPES[recipe]
        self.diffusion_options = {**diffusion, **(diffusion_options or {})}
        self.discovery_options = {**discovery, **(discovery_options or {})}
        self.volumes = BraTSVolumes(root, split, self.options)
        self.volumes.require_masks()

    def fill(self, name: str) -> dict:
        """The row of a method, computed or read from an earlier run.

        Returns:
            `rows` (plain and post-processed, see [`score_brats`]; with kind, labels, published scores,
            `training_seconds`, `None` if trained in a process of its own, and `peak_memory_mib`), `cases`, `settings`,
            `weights_sha256`, `environment`.

        Raises:
            InputError: for an unknown row, or one that would be scored on cases it was trained on.
            ModelError: if the folder holds results of other settings, or a training fails.
            NetworkError: if a baseline's weights cannot be fetched.
        """
        if name not in table3_rows():
            raise InputError(f"{name}: no such row; there are {', '.join(table3_rows())}.")
        if self.split in ("train", "all") and self._learns(name):
            raise InputError(f"{name}: is trained on the folder's training cases; score it on test or validation.")
        path, settings = self.output / "rows" / f"{name}.json", self.settings_of(name)
        if path.exists():
            row = read_record(path, "settings", "rows")
            if row["settings"] != settings:
                raise ModelError(f"{path}: made with other settings ({row['settings']}); choose another --output.")
            return row
        with PeakMemory() as memory:
            title, predict, parts, weights, seconds = self._method(name)
            rows, cases = score_brats(predict, self.volumes, parts)
        method = METHODS.get(name)
        details = {
            "kind": method.kind if method else UNSUPERVISED,
            "labels": method.labels if method else "none",
            "published": list(published_brats(title) or ()) or None,
            "training_seconds": seconds,
            "peak_memory_mib": memory.peak_mib,
        }
        row = {
            "method": name,
            "rows": [{"method": title, "parts": parts, **details, **r} for r in rows],
            "cases": cases,
            "settings": settings,
            "weights_sha256": weights,
            "environment": describe_environment(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, row)
        return row

    def settings_of(self, name: str) -> dict:
        """What a row must have been made with, as JSON values."""
        found = {"split": self.split, "cases": self.volumes.split_ids[self.split], "seed": self.seed}
        found["brats"] = _plain(asdict(self.options))
        if name in TRAINED or self._needs_teacher(name):
            found["diffusion"] = _plain(self.diffusion_options)
        if name in TRAINED:
            found["discovery"] = _plain({**self.discovery_options, **TRAINED[name].options})
        if name in BASELINES and METHODS[name].trained:
            preset = METHODS[name].baseline.hyper_parameters(self.preset)
            found |= {"preset": preset, "labels": METHODS[name].labels}
        if name in BASELINES and METHODS[name].needs_med3d:
            found["med3d"] = self.med3d
        if name in EMBEDDED:
            found["weights_sha256"] = weights_sha256(resolve_model(name).folder)
        return found

    def _method(self, name: str) -> tuple[str, Callable, int, str | None, float | None]:
        """Title, prediction of a (1, h, w, d) volume, number of parts, sha256 of the weights, seconds of training."""
        if name in TRAINED or name in EMBEDDED:
            folder = self._train(name) if name in TRAINED else resolve_model(name).folder
            network = load_discovery(str(folder)).to(self.device)
            title = TRAINED[name].title if name in TRAINED else name
            predict = lambda v: network.segment(v[None]).labels[0].cpu().numpy()  # noqa: E731
            return title, predict, network.config.num_parts, weights_sha256(folder), None
        method = METHODS[name]
        teacher = load_teacher(str(self._teacher())).to(self.device) if method.needs_teacher else None
        device = str(self.device)
        baseline = make_baseline(method, NUM_PARTS, self.seed, teacher, self.preset, device, self.med3d)
        if not method.trained:
            if self.split in ("test", "validation"):
                baseline.fit(BraTSVolumes(self.root, "train", self.options))
            return method.title, baseline.predict, NUM_PARTS, None, 0.0
        train = BraTSVolumes(self.root, "train", self.options)
        if method.labels != "none":
            train.require_masks()
        volumes = LimitedLabels(train, lambda i: _parts_of(train, i), method.labels, self.seed)
        baseline.fit(volumes, self.output / "models" / name)
        return method.title, baseline.predict, NUM_PARTS, None, round(baseline.training_seconds, 3)

    def _learns(self, name: str) -> bool:
        """Whether the folder's training cases are used for more than scores."""
        return name in TRAINED or self._needs_teacher(name) or (name in METHODS and METHODS[name].trained)

    def _needs_teacher(self, name: str) -> bool:
        return name in METHODS and name not in TRAINED and METHODS[name].needs_teacher

    def _teacher(self) -> Path:
        """The diffusion model, trained on the folder's training cases if need be."""
        return self._run(Training("diffusion", self._shared(self.diffusion_options), self.output / "models/diffusion"))

    def _train(self, name: str) -> Path:
        options = {**self.discovery_options, **TRAINED[name].options, "teacher": self._teacher()}
        return self._run(Training("discovery", self._shared(options), self.output / "models" / name))

    def _shared(self, options: dict) -> dict:
        prepared = {
            "modality": self.options.modality,
            "grade": self.options.grade,
            "crop": self.options.crop,
            "clip_percentiles": self.options.clip_percentiles,
        }
        given = {k: v for k, v in prepared.items() if v is not None}
        return {**options, **given, "dataset": self.root, "seed": self.seed}

    def _run(self, training: Training) -> Path:
        """Run a training in a process of its own, from its last checkpoint; one that is finished is left alone."""
        folder = training.folder
        if any((folder / marker).is_file() for marker in ("model_index.json", "config.json")):
            return folder
        start = shlex.split(self.launcher) or [sys.executable, "-m"]
        command = [*start, "diffdiscover3d.train", *training.arguments(), "--resume", "latest"]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code:
            raise ModelError(f"a training ended with exit code {code}: {' '.join(command)}")
        return folder


def fill_table3(
    root: str | Path,
    output: str | Path,
    methods: Sequence[str] | None = None,
    on_row: Callable[[dict], None] | None = None,
    **options,
) -> dict:
    """Fill Table 3 and write `table3.json` and `table3.md`; interrupted, the same call continues.

    Args:
        root: the folder of a BraTS edition.
        output: folder for models, rows and tables.
        methods: names out of [`table3_rows`]; default: all, but for baselines whose weights cannot be had, which are
            left out with the reason under "left_out".
        on_row: called with each row.
        **options: of [`BraTSTable`].

    Raises:
        InputError, ModelError, NetworkError: as [`BraTSTable.fill`].
    """
    table = BraTSTable(root, output, **options)
    rows, cases, left_out, details = [], {}, {}, {}
    for name in methods or table3_rows():
        try:
            row = table.fill(name)
        except (InputError, ModelError, NetworkError) as error:
            if methods or name not in BASELINES:
                raise
            logger.warning("%s is left out: %s", name, error)
            left_out[name] = str(error)
            continue
        rows += row["rows"]
        cases[name] = row["cases"]
        details[name] = {k: row[k] for k in ("settings", "weights_sha256", "environment")}
        if on_row:
            on_row(row)
    result = {
        "table": 3,
        "dataset": Path(root).name,
        "split": table.split,
        "rows": rows,
        "cases": cases,
        "details": details,
        "left_out": left_out,
        "split_ids": table.volumes.split_ids,
    }
    write_json(table.output / "table3.json", result)
    write_text(table.output / "table3.md", format_table3(rows) + "\n")
    return result


def format_table3(rows: Sequence[dict]) -> str:
    """Table 3 in Markdown, from the rows of [`fill_table3`]: our scores, the published ones, and the costs."""
    header = ["method", "post-processed", "Dice WT", "std", "HD95 (mm)", "std", "empty"]
    header += ["published Dice", "published HD95 (mm)", "kind", "labels", "training (s)", "memory (MiB)"]
    lines = []
    for row in rows:
        published = ("" if value is None else str(value) for value in row["published"] or (None, None))
        seconds = row["training_seconds"]
        lines.append(
            (
                row["method"],
                "yes" if row["postprocessed"] else "no",
                *(f"{row[k]:.3f}" for k in ("dice", "dice_std")),
                *(f"{row[k]:.1f}" for k in ("hd95_mm", "hd95_std")),
                row["empty"],
                *published,
                row["kind"],
                LABEL_AMOUNTS[row["labels"]],
                "" if seconds is None else f"{seconds:.0f}",
                f"{row['peak_memory_mib']:.0f}",
            )
        )
    return markdown_table(header, lines)


def _parts_of(volumes: BraTSVolumes, index: int) -> torch.Tensor:
    """True parts of a case on the grid of its prepared volume."""
    return torch.from_numpy(volumes.crop(volumes.true_parts(index)))


def _plain(options: dict) -> dict:
    """Tuples as lists, as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
