"""Model cards: every recorded value is shown, lines of missing values are left out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub.cards import folder_kind, render_card, training_command
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, as_dict, make_config
from diffdiscover3d.utils.files import sha256

DATASETS = ("synthetic-regular", "synthetic-irregular", "synthetic", "brats", "own")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each kind."""
    root = tmp_path_factory.mktemp("cards")
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
    StructureDiscoveryModel(num_parts=3).save_pretrained(root / "discovery")
    DiffusionFeaturePipeline(unet, make_scheduler(250)).save_pretrained(root / "diffusion")
    unet.save_pretrained(root / "unet")
    return root


@pytest.fixture
def folder_of(folders, tmp_path):
    def make(kind: str, dataset: str | None, **files) -> Path:
        folder = tmp_path / f"{kind}-{dataset}"
        shutil.copytree(folders / kind, folder)
        if dataset:
            config = DiscoveryConfig if kind == "discovery" else DiffusionConfig
            preset = "brats" if dataset == "brats" else "small"
            options = {"preset": preset, "dataset": dataset if dataset != "own" else "scans"}
            options |= {"num_parts": 3, "teacher": "out/diffusion"} if kind == "discovery" else {}
            (folder / "train_config.json").write_text(json.dumps(as_dict(make_config(config, **options))))
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        return folder

    return make


def split_card(text: str) -> tuple[dict, str]:
    return yaml.safe_load(text.split("---\n")[1]), text.split("---\n", 2)[2]


@pytest.mark.parametrize("kind", ["diffusion", "discovery", "unet"])
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("full", [False, True])
def test_every_card_is_complete(folder_of, kind, dataset, full):
    row = {"method": "diffdiscover3d", "parts": 3, "dice": 0.61239, "dice_std": 0.1, "hd95_mm": 27.83}
    origin = {"preset": "brats"} if dataset == "brats" else {"dataset": dataset}
    scores = {"scores": {"rows": [row], "split": "validation", **origin}}
    folder = folder_of(kind, dataset, **(scores if full else {}))
    if full:
        (folder / "preview.png").write_bytes(b"png")
    text = render_card(folder, "someone/model-3d")
    metadata, body = split_card(text)
    for leftover in ("{{", "{%", "{#", "None", "TODO", "nan", "Information Needed", "[your", "]()", "undefined"):
        assert leftover not in text, leftover
    assert metadata["library_name"] == "diffdiscover3d" and "pipeline_tag" in metadata
    assert metadata.get("datasets") == (None if dataset == "own" else [dataset])
    assert body.count("```") % 2 == 0 and "someone/model-3d" in body and "arXiv:2305.00067" in body
    assert "not a medical device" in body and "accelerate launch -m diffdiscover3d.train" in body
    assert ("## Scores" in body) == full and ("](preview.png)" in body) == full
    assert ("model-index" in metadata) == full
    card = ModelCard(text)  # as the Hub parses it
    if full:
        results = {r.metric_type: r.metric_value for r in card.data.eval_results}
        assert results == {"dice": 0.6124, "hd95": 27.83}
        assert "| diffdiscover3d | 0.612 | 0.100 | 27.8 |" in body
        assert card.data.eval_results[0].dataset_name == dataset
        assert card.data.eval_results[0].dataset_split == "validation" and "the validation" in body


def test_scored_and_trained_datasets_are_separate(folder_of):
    rows = [{"method": "diffdiscover3d", "parts": 3, "dice": 0.5}]
    scores = {"rows": rows, "dataset": "synthetic-regular", "split": "test"}
    folder = folder_of("discovery", "own", scores=scores)
    metadata, body = split_card(render_card(folder, "a/b"))
    assert "datasets" not in metadata and "synthetic" not in metadata["tags"]
    assert "not published with it" in body and "Trained on the regular" not in body and "only on synthetic" not in body
    result = metadata["model-index"][0]["results"][0]
    assert (result["dataset"]["type"], result["dataset"]["split"]) == ("synthetic-regular", "test")
    assert "test volumes of synthetic-regular" in body
    (folder / "train_config.json").unlink()
    metadata, body = split_card(render_card(folder, "a/b"))
    assert "datasets" not in metadata and "Its training data is not published" in body


def test_the_preparation_of_brats_is_taken_from_the_options(folder_of):
    folder = folder_of("discovery", "brats")
    body = " ".join(split_card(render_card(folder, "a/b"))[1].split()).replace("\u00d7", "x")
    assert "Trained on FLAIR volumes" in body and "200x200x155 voxels" in body and "percentiles" not in body
    options = json.loads((folder / "train_config.json").read_text())
    options |= {"modality": "t1c", "crop": [128, 120, 96], "clip_percentiles": [0.5, 99.5]}
    (folder / "train_config.json").write_text(json.dumps(options))
    text = split_card(render_card(folder, "a/b"))[1]
    body = " ".join(text[: text.index("## Training")].split()).replace("\u00d7", "x")
    assert "Trained on T1ce volumes" in body and "co-registered T1ce volumes" in body and "FLAIR" not in body
    assert "128x120x96 voxels of its centre, clipped to percentiles 0.5 and 99.5 of its tissue and min-max" in body


def test_missing_values_are_left_out(folder_of):
    rows = [
        {"method": "diffdiscover3d", "parts": 3, "dice": 0.5, "dice_std": None},
        {"method": "k-means", "parts": 3, "dice": float("nan")},
        {"method": "diffdiscover3d", "parts": 8, "dice": 0.9},
    ]
    metadata, body = split_card(render_card(folder_of("discovery", "synthetic-regular", scores={"rows": rows}), "a/b"))
    assert "| method | Dice |\n" in body and "| k-means |  |" in body and "0.900" not in body
    assert len(metadata["model-index"][0]["results"]) == 1


def test_a_folder_without_training_options(folders):
    text = render_card(folders / "discovery", "a/b")
    assert "## Training\n" not in text and "3 parts" in text and "not published with it" in text


def test_scores_of_other_weights_are_refused(folder_of):
    folder = folder_of("discovery", "synthetic-regular")
    own = {"diffusion_pytorch_model.safetensors": sha256(folder / "diffusion_pytorch_model.safetensors")}
    rows = [{"method": "diffdiscover3d", "parts": 3, "dice": 0.5}]
    several = {"theirs": {"x.safetensors": "0"}, "mine": own}
    for weights, right in ((several, True), (own, True), ({}, True), ({"2": {**own, "more": "0"}}, False)):
        (folder / "scores.json").write_text(json.dumps({"rows": rows, "weights_sha256": weights}))
        if right:
            assert "0.500" in render_card(folder, "a/b")
        else:
            with pytest.raises(ModelError, match="other weights"):
                render_card(folder, "a/b")
    other = folder_of("diffusion", "own", scores={"rows": rows, "weights_sha256": {"x.safetensors": "0"}})
    with pytest.raises(ModelError, match=r"differ\); remove it") as caught:
        render_card(other, "a/b")
    assert "evaluate" not in str(caught.value)
    (folder / "scores.json").write_text('{"rows": [3]}')
    with pytest.raises(ModelError, match="rows"):
        render_card(folder, "a/b")


def test_rows_are_matched_by_weights_not_by_name(folder_of):
    folder = folder_of("discovery", "brats")
    own = {"diffusion_pytorch_model.safetensors": sha256(folder / "diffusion_pytorch_model.safetensors")}
    rows = [
        {"method": "mine", "parts": 3, "dice": 0.5, "hd95_mm": 40.0, "postprocessed": False},
        {"method": "mine", "parts": 3, "dice": 0.6, "hd95_mm": 20.0, "postprocessed": True},
        {"method": "diffdiscover3d", "parts": 3, "dice": 0.9, "hd95_mm": 2.0, "postprocessed": False},
    ]
    # the other model has the name of rows without recorded weights
    scores = {"rows": rows, "weights_sha256": {"mine": own, "diffdiscover3d": {"x.safetensors": "0"}}}
    (folder / "scores.json").write_text(json.dumps(scores))
    metadata, body = split_card(render_card(folder, "a/b"))
    metrics = [m for r in metadata["model-index"][0]["results"] for m in r["metrics"]]
    assert sorted(m["value"] for m in metrics) == [0.5, 0.6, 20.0, 40.0]
    assert "| mine, post-processed | 0.600 | 20.0 |" in body and "| diffdiscover3d | 0.900 | 2.0 |" in body


def test_a_nested_network_shows_every_level(tmp_path):
    coarse = StructureDiscoveryModel(num_parts=2)
    StructureDiscoveryModel.from_parent(coarse, children=(1, 3)).save_pretrained(tmp_path)
    rows = [{"method": "diffdiscover3d", "parts": k, "dice": k / 10} for k in (2, 4, 8)]
    (tmp_path / "scores.json").write_text(json.dumps({"rows": rows}))
    metadata, body = split_card(render_card(tmp_path, "a/b"))
    assert "| diffdiscover3d | 2 | 0.200 |" in body and "| 4 | 0.400 |" in body and "| 8 |" not in body
    results = metadata["model-index"][0]["results"]
    names = {m["name"] for r in results for m in r["metrics"]}
    assert names == {"Dice, 2 parts", "Dice, 4 parts"}


def test_the_training_command_trains_the_same():
    """Parsing the command gives the options back."""
    from diffdiscover3d.train import make_parser

    options = as_dict(
        make_config(
            DiscoveryConfig,
            preset="small",
            dataset="my scans",
            teacher="a/b",
            num_parts=5,
            stages=(1, 3),
            flips=False,
            crop=(5, 6, 7),
        )
    )
    import shlex

    words = shlex.split(training_command("discovery", options))
    parsed = vars(make_parser().parse_args(words[4:]))
    parsed.pop("phase")
    parsed.pop("debug"), parsed.pop("quiet")
    again = as_dict(make_config(DiscoveryConfig, **{k: v for k, v in parsed.items() if k != "config"}))
    assert again == {**options, "output_dir": "out/discovery"}


def test_folder_kinds(folders, tmp_path):
    for kind in ("diffusion", "discovery", "unet"):
        assert folder_kind(folders / kind) == kind
    with pytest.raises(ModelError, match="diffusion, discovery, unet"):
        folder_kind(folders)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ModelError, match="UNet2DModel"):
        folder_kind(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        folder_kind(tmp_path)


def test_the_templates_are_in_the_wheel():
    """The templates are package data."""
    import tomllib

    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {p for pattern in patterns["diffdiscover3d"] for p in (root / "diffdiscover3d").glob(pattern)}
    templates = set((root / "diffdiscover3d" / "hub" / "templates").rglob("*.jinja"))
    assert templates and templates <= found
    for template in templates:
        for name in re.findall(r"{% (?:extends|include) \"([^\"~]+)\"", template.read_text()):
            assert (root / "diffdiscover3d" / "hub" / "templates" / name).exists() or name == "datasets/"


def test_cards_need_no_torch():
    assert torch.__version__  # importing torch would cost seconds in `--help`
    import subprocess
    import sys

    code = "import sys, diffdiscover3d.hub.cards; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
