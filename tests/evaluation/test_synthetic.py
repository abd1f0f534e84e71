"""Evaluation on synthetic cells, and minimum scores of the embedded models."""

import hashlib
import json

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.evaluation.synthetic import evaluate, format_rows, score
from diffdiscover3d.hub.registry import embedded_models, load_discovery, load_teacher
from diffdiscover3d.utils.provenance import weights_sha256


def test_score_of_a_perfect_method():
    volumes = load_volumes("synthetic-irregular", "validation")
    answers = iter([volumes[i]["labels"][1].numpy() for i in range(20)])
    row = score(lambda _: next(answers), volumes, level=2)
    assert row["dice"] == row["dice_one_matching"] == 1 and row["dice_std"] == 0


def test_kmeans_splits_intensities():
    volume = torch.tensor([0.0, 0.1, 0.9, 1.0] * 6).reshape(1, 2, 3, 4)
    labels = IntensityKMeans(2, seed=0).predict(volume)
    assert labels.shape == (2, 3, 4) and labels.dtype == np.uint8
    assert ((labels == labels[0, 0, 0]) == (volume[0].numpy() < 0.5)).all()


def test_evaluate_reports_model_and_kmeans(tiny_discovery):
    with pytest.raises(InputError, match="3 parts"):
        evaluate(str(tiny_discovery))
    with pytest.raises(InputError, match="no labels"):
        evaluate(dataset="some/folder")


def test_embedded_models_beat_kmeans_on_fresh_volumes():
    """Ten validation volumes, for speed; the committed scores are for all 20 test volumes."""
    volumes = load_volumes("synthetic-regular", "validation")
    for level, parts in ((1, 2), (2, 4), (3, 8)):
        model = load_discovery("synthetic-regular", level)
        assert model.config.num_parts == parts and model.dtype == torch.float32
        ours, theirs = [], []
        for i in range(10):
            volume, true = volumes[i]["volume"], volumes[i]["labels"][level - 1].numpy()
            single = [{"volume": volume, "labels": volumes[i]["labels"]}]
            ours.append(score(lambda v, m=model: m.segment(v[None]).labels[0].numpy(), single, level)["dice"])
            clusters = KMeans(parts, n_init=1, random_state=0).fit_predict(volume.reshape(-1, 1).numpy())
            theirs.append(score(lambda _, c=clusters, t=true: c.reshape(t.shape), single, level)["dice"])
        assert np.mean(ours) > np.mean(theirs), level


def test_embedded_models_are_whole_and_small():
    models = embedded_models()
    assert set(models) == {"synthetic-regular", "synthetic-irregular", "brain-flair"}
    assert all(model.levels == (1, 2, 3) for model in models.values())
    weights = [p for m in models.values() for p in m.folder.rglob("*.safetensors")]
    assert sum(p.stat().st_size for p in weights) < 12e6
    teacher = load_teacher("synthetic-regular")
    assert teacher(torch.rand(20, 30, 25), stages=(1,)).features[0].shape[:2] == (1, 64)
    with pytest.raises(ModelError, match=r"levels \[1, 2, 3\], not 4"):
        load_discovery("synthetic-regular", 4)
    with pytest.raises(ModelError, match="synthetic-regular"):
        load_discovery("synthetic-reglar")


def test_evaluate_writes_what_it_used(tmp_path):
    result = evaluate(split="validation", levels=[1])
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {"diffdiscover3d", "k-means"} and result["volumes"] == 20
    assert rows["diffdiscover3d"]["dice"] > 0.9
    assert result["weights_sha256"]["diffusion_pytorch_model.safetensors"]
    assert result["environment"]["packages"]["torch"] == torch.__version__
    json.dumps(result)
    assert "| 1 | 2 | k-means |" in format_rows(result["rows"])


def test_checkpoints_are_not_the_model(tmp_path):
    for name in ("diffusion_pytorch_model.safetensors", "unet/a.safetensors", "checkpoints/checkpoint-1/b.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = weights_sha256(tmp_path)
    assert list(found) == ["diffusion_pytorch_model.safetensors", "unet/a.safetensors"]
    assert found["unet/a.safetensors"] == hashlib.sha256(b"unet/a.safetensors").hexdigest()
