"""Model cards, rendered from the templates in `hub/templates/` and the files of a model's folder.

A line whose value is missing is left out.
"""

import dataclasses
import math
import re
import shlex
from pathlib import Path

from diffdiscover3d import __version__
from diffdiscover3d.errors import ModelError
from diffdiscover3d.training.brain_config import BrainConfig
from diffdiscover3d.training.config import PRESETS, DiffusionConfig, DiscoveryConfig, as_dict, make_config
from diffdiscover3d.utils.files import read_model_json, sha256, write_text

CARD_NAME, SCORES_NAME, PICTURE_NAME = "README.md", "scores.json", "preview.png"
SYNTHETIC = ("synthetic-regular", "synthetic-irregular", "synthetic")
DATASETS = (*SYNTHETIC, "brats")  # any other is own data
_OURS = "diffdiscover3d"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MARKUP = re.compile(r"[\\`*_\[\]<>|#~$]")
_KINDS = {
    "DiffusionFeaturePipeline": "diffusion",
    "VolumeGenerationPipeline": "diffusion",
    "StructureDiscoveryModel": "discovery",
    "UNet3DModel": "unet",
}
# keys and headings of the table of scores
_COLUMNS = {
    "parts": "parts",
    "dice": "Dice",
    "dice_std": "std",
    "dice_one_matching": "Dice, one matching",
    "hd95_mm": "HD95 (mm)",
}
_FORMATS = {"hd95_mm": ".1f", "parts": "d"}
_MODALITIES = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}
_MODALITIES |= {"t2f": "FLAIR", "t1n": "T1", "t1c": "T1ce", "t2w": "T2"}  # the names of 2023
_BRATS_CROP = (200, 200, 155)  # the default of the BraTS data
# types of the values of `train_config.json`, and of `scores.json` and its rows
_OPTION_KINDS = {"dataset": str, "preset": str, "modality": str, "crop": list, "clip_percentiles": list}
_SCORE_KINDS = {"dataset": str, "preset": str, "split": str, "weights_sha256": dict, "rows": list}
_ROW_KINDS = {"method": str, "parts": int}
_TAGS = ["3d", "diffusion", "unsupervised-segmentation", "biomedical-imaging"]


def folder_kind(folder: str | Path) -> str:
    """The kind of model in a folder: "diffusion" (a pipeline), "discovery" or "unet".

    Raises:
        ModelError: if it holds none of these.
    """
    folder = Path(folder)
    for marker in ("model_index.json", "config.json"):
        if (folder / marker).is_file():
            name = read_model_json(folder / marker).get("_class_name")
            if name in _KINDS:
                return _KINDS[name]
            raise ModelError(f"{folder / marker}: is of class {name!r}, not one of {', '.join(_KINDS)}.")
    deeper = sorted({p.parent.relative_to(folder).as_posix() for p in folder.glob("*/*.json") if p.stem != "log"})
    hint = f"; there are models in {', '.join(deeper[:4])}: give one of them" if deeper else ""
    raise ModelError(f"{folder}: no model in this folder (neither model_index.json nor config.json){hint}.")


def render_card(folder: str | Path, repo_id: str) -> str:
    """The model card of a folder, YAML metadata included.

    Args:
        folder: a model folder; `train_config.json`, `scores.json` and `preview.png` are used if they exist.
        repo_id: `user/name`, for the lines that load the model.

    Raises:
        ModelError: if the folder holds no model, `scores.json` is of other weights, or a file is damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = Path(folder)
    kind = folder_kind(folder)
    options = _read_optional(folder / "train_config.json", _OPTION_KINDS)
    rows = _score_rows(folder, kind)
    scores = _read_optional(folder / SCORES_NAME, _SCORE_KINDS)
    dataset, scored = _dataset_of(options), _dataset_of(scores)
    environment = Environment(
        loader=PackageLoader("diffdiscover3d.hub", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    columns = [c for c in _COLUMNS if c != "parts" and any(_is_number(row.get(c)) for row in rows)]
    if len({row.get("parts") for row in rows}) > 1:  # a nested network is scored at each of its levels
        columns.insert(0, "parts")
    text = environment.get_template(f"{kind}.md.jinja").render(
        metadata=_metadata(kind, dataset, repo_id, rows, scored, scores.get("split")).to_yaml(),
        repo_id=repo_id,
        name=repo_id.split("/")[1],
        dataset=dataset,
        trained=bool(options),
        scored=escape_markdown(scored),
        split=escape_markdown(scores.get("split") or ""),
        modality=escape_markdown(
            _MODALITIES.get(str(options.get("modality") or "flair").lower()) or str(options.get("modality"))
        ),
        crop=_escape_values(options.get("crop") or _BRATS_CROP),
        clip_percentiles=_escape_values(options.get("clip_percentiles")),
        config=_escape_values(read_model_json(folder / "config.json")) if kind != "diffusion" else {},
        command=_CONTROL.sub("?", training_command(kind, options)) if options else None,
        header=["method", *(_COLUMNS[c] for c in columns)],
        rows=[[escape_markdown(_method_name(row)), *(_format_score(row, c) for c in columns)] for row in rows],
        picture=PICTURE_NAME if (folder / PICTURE_NAME).is_file() else None,
        version=__version__,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(text: str) -> str:
    """A string as plain text of a Markdown line or table cell: no markup, no HTML, no line breaks."""
    return _MARKUP.sub(r"\\\g<0>", _CONTROL.sub(" ", str(text)))


def _escape_values(value):
    if isinstance(value, dict):
        return {key: _escape_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escape_values(inner) for inner in value]
    return escape_markdown(value) if isinstance(value, str) else value


def write_card(folder: str | Path, repo_id: str) -> Path:
    """Render the card of a folder into its README.md."""
    path = Path(folder) / CARD_NAME
    write_text(path, render_card(folder, repo_id))
    return path


def training_command(kind: str, options: dict) -> str:
    """The command line that trains with these options: the preset, and every option that differs from it."""
    phase, config = ("discovery", DiscoveryConfig) if kind == "discovery" else ("diffusion", DiffusionConfig)
    if "reassign_every" in options:  # both models of a brain training share its options
        phase, config = "brain", BrainConfig
    known = {f.name for f in dataclasses.fields(config)}
    options = {k: v for k, v in options.items() if k in known}
    preset = options.get("preset", config.preset)
    defaults = as_dict(make_config(config, preset=preset)) if preset in PRESETS[config] else {}
    words = ["accelerate", "launch", "-m", "diffdiscover3d.train", phase, "--preset", preset]
    quiet = {"preset", "output_dir", "resume", "report_to", "num_workers", "log_every", "checkpoint_every"}
    quiet |= {"keep_checkpoints", "preview_every"}
    for name, value in options.items():
        if name in quiet or (value == defaults.get(name) and name != "dataset"):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--output-dir", f"out/{phase}"])


def _metadata(kind: str, dataset: str, repo_id: str, rows: list[dict], scored: str, split: str | None):
    from huggingface_hub import EvalResult, ModelCardData

    published = dataset if dataset in DATASETS else None
    ours = [row for row in rows if row["ours"]]
    names = {"dice": "Dice", "hd95_mm": "HD95 (mm)"}
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="unsupervised part discovery",
            dataset_type=scored,
            dataset_name=scored,
            dataset_split=split,
            metric_type=metric.removesuffix("_mm"),
            metric_name=name
            + (f", {row['parts']} parts" if row.get("parts") else "")
            + (", post-processed" if row.get("postprocessed") else ""),
            metric_value=round(row[metric], 4),
        )
        for row in ours
        for metric, name in names.items()
        if _is_number(row.get(metric))
    ]
    return ModelCardData(
        library_name="diffdiscover3d",
        license="apache-2.0",
        tags=[*_TAGS, kind] + (["synthetic"] if dataset in SYNTHETIC else []),
        datasets=[published] if published else None,
        pipeline_tag="image-segmentation" if kind == "discovery" else "image-feature-extraction",
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )


def _score_rows(folder: Path, kind: str) -> list[dict]:
    """Rows of `scores.json` at the numbers of parts of this model; `ours` marks the rows of its own weights."""
    scores = _read_optional(folder / SCORES_NAME, _SCORE_KINDS)
    if not scores:
        return []
    recorded = scores.get("weights_sha256") or {}
    if any(isinstance(value, str) for value in recorded.values()):
        recorded = {_OURS: recorded}  # of one model; several are recorded by name
    own = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*.safetensors"))}
    names = {name for name, weights in recorded.items() if weights == own}
    if recorded and not names:
        again = f"run `diffdiscover3d evaluate --model {folder} --output {folder / SCORES_NAME} --overwrite` again, or "
        again = again if kind == "discovery" else ""  # nothing else is evaluated
        raise ModelError(f"{folder / SCORES_NAME}: is of other weights (their sha256 differ); {again}remove it.")
    rows = scores.get("rows") or []
    if not rows or not all(isinstance(row, dict) and row.get("method") for row in rows):
        raise ModelError(f"{folder / SCORES_NAME}: has no `rows` with a `method` each; it is not from `evaluate`.")
    for row in rows:
        _check_kinds(folder / SCORES_NAME, row, _ROW_KINDS)
    parts = _numbers_of_parts(read_model_json(folder / "config.json")) if kind == "discovery" else None
    rows = [row for row in rows if parts is None or row.get("parts") is None or row["parts"] in parts]
    return [{**row, "ours": row["method"] in (names if recorded else {_OURS})} for row in rows]


def _numbers_of_parts(config: dict) -> set[int]:
    """The numbers of parts of a network and of its coarser levels."""
    parent, number = config.get("parent"), config.get("num_parts")
    own = {number} if isinstance(number, int) else set()
    return own | (_numbers_of_parts(parent) if isinstance(parent, dict) else set())


def _dataset_of(source: dict) -> str:
    """The published dataset named in options or scores; "own" for any other, or if none is named."""
    if source.get("dataset") in DATASETS:
        return source["dataset"]
    return "brats" if source.get("preset") == "brats" else "own"


def _method_name(row: dict) -> str:
    return f"{row['method']}, post-processed" if row.get("postprocessed") else str(row["method"])


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _format_score(row: dict, column: str) -> str:
    return format(row[column], _FORMATS.get(column, ".3f")) if _is_number(row.get(column)) else ""


def _read_optional(path: Path, kinds: dict[str, type]) -> dict:
    """A JSON object whose known values are of their types or null; empty if there is no file.

    Raises:
        ModelError: if it is damaged.
    """
    if not path.is_file():
        return {}
    value = read_model_json(path)
    _check_kinds(path, value, kinds)
    return value


def _check_kinds(path: Path, value: dict, kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        found = value.get(name)
        if found is not None and not isinstance(found, kind):
            shown = repr(found)[:60]
            raise ModelError(f"{path}: `{name}` must be of type {kind.__name__}, got {shown}; correct or remove it.")
