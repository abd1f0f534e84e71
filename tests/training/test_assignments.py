"""Training on assigned parts: what is assigned, what the steps see, resuming, several processes."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.train import main, run
from diffdiscover3d.training.assignments import Assignments, part_families, recolor
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.launch import make_accelerator

GRID = (14, 16, 12)


def cell(index):
    """A box with two bright inclusions of unequal size in a dark background, and its labels 0 to 3."""
    labels = np.zeros(GRID, dtype=np.uint8)
    labels[1:13, 1:15, 1:11] = 1
    labels[2:7, 2:8, 2:8] = 2
    labels[9:12, 10:14, 6:10] = 3
    noise = np.random.default_rng(index).normal(0, 0.15, GRID)
    return (np.array([-2, 0, 1.5, 1.5 + 0.1 * index])[labels] + noise).astype(np.float32), labels


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for i in range(4):
        nib.save(nib.Nifti1Image(cell(i)[0], np.eye(4)), folder / f"cell{i}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def teacher(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    options = {"preset": "small", "width": 8, "sample_size": 8, "mixed_precision": "no", "max_steps": 2}
    run(make_config(DiffusionConfig, **options, dataset=str(scans), output_dir=str(output), preview_every=0))
    return output


class Threshold(torch.nn.Module):
    """A network of two parts that divides by intensity: a parent whose parts are known."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return torch.cat([-self.slope * (x - 0.28), self.slope * (x - 0.28)], dim=1)


def by_threshold():
    model = StructureDiscoveryModel(2, norm="instance", dropout=0.0).eval()
    model.network = Threshold()
    return model


def inside_of_it(children):
    """A new network that divides the parts of the one above."""
    coarse = StructureDiscoveryModel(2, norm="instance", dropout=0.0)
    model = StructureDiscoveryModel.from_parent(coarse, children, norm="instance", dropout=0.0)
    model.parent_model.network = Threshold()
    return model


def config(scans, teacher, output, **options):
    defaults = {
        "preset": "small", "mixed_precision": "no", "memory_format": "channels_last", "objective": "assignment",
        "dropout": 0.0, "selection": "last", "batch_size": 2, "log_every": 1, "preview_every": 0, "max_steps": 6,
        "reliable_share": 1.0, "num_parts": 4, "teacher": str(teacher), "dataset": str(scans),
        "output_dir": str(output),
    }  # fmt: skip
    return make_config(DiscoveryConfig, **{**defaults, **options})


@pytest.fixture
def clean_is_raw(monkeypatch):
    """The tiny teacher denoises nothing; a volume is its own clean prediction."""
    monkeypatch.setattr("diffdiscover3d.training.assignments.denoise", lambda teacher, volume, *_: volume[0, 0])


def assign(scans, teacher, model, start=None, **options):
    chosen = config(scans, teacher, "out", **options)
    volumes = load_volumes(str(scans))
    return Assignments(chosen, load_teacher(str(teacher)), model, start, volumes, None, make_accelerator(chosen))


def test_clusters_in_space_are_assigned(scans, teacher, clean_is_raw):
    model = inside_of_it((1, 3))
    found = assign(scans, teacher, model)
    assert found.families == [(1, 2, 3)] and found.used == [0, 1, 2, 3]
    for i in range(4):
        labels, reliable = found.labels[i]
        np.testing.assert_array_equal(labels.numpy(), cell(i)[1])
        np.testing.assert_array_equal(reliable.numpy(), cell(i)[1] > 0)  # what is not divided does not count
    # contrasts of 1.5 to 1.8 at a noise of 0.15
    assert found.contrast == pytest.approx(
        np.sqrt(np.mean([1.5**2] * 4 + [(1.5 + 0.1 * i) ** 2 for i in range(4)]) / 2) / 0.15, rel=0.05
    )
    best = assign(scans, teacher, model, reliable_share=0.5)
    assert len(best.used) == 2 and best.used == sorted(best.used)


def test_an_object_in_two_halves_is_reliable_by_its_contrast_only(tmp_path, teacher, clean_is_raw):
    values, labels = cell(0)
    one_object = np.where(labels > 1, values - 1.5, values)  # the inclusions vanish, a larger and brighter one appears
    one_object[4:9, 4:12, 3:8] += 2.5
    for name, scan in (("a", one_object), ("b", values)):
        nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / f"{name}.nii.gz")
    used = {
        rule: assign(tmp_path, teacher, inside_of_it((1, 3)), reliable_share=0.5, reliability=rule).used
        for rule in ("contrast", "separation")
    }
    assert used == {"contrast": [0], "separation": [1]}


def test_spacing_of_a_resampled_scan(tmp_path, teacher, clean_is_raw, monkeypatch):
    nib.save(nib.Nifti1Image(cell(0)[0], np.diag([1, 2, 3, 1])), tmp_path / "cell.nii.gz")
    chosen, asked = config(tmp_path, teacher, "out"), []
    original = Assignments._from_clusters

    def noted(self, model, volume, clean, spacing, alike):
        asked.append((volume.shape[2:], spacing))
        return original(self, model, volume, clean, spacing, alike)

    monkeypatch.setattr(Assignments, "_from_clusters", noted)
    accelerator, loaded = make_accelerator(chosen), load_teacher(str(teacher))
    for grid, spacing in ((None, (1, 2, 3)), ((7, 16, 24), (2, 2, 1.5))):
        asked.clear()
        Assignments(chosen, loaded, inside_of_it((1, 3)), None, load_volumes(str(tmp_path)), grid, accelerator)
        assert asked == [(grid or GRID, pytest.approx(spacing))]


def test_a_structure_without_inclusions_is_one_part(tmp_path, teacher, clean_is_raw):
    for i in range(2):
        values, labels = cell(i)
        nib.save(nib.Nifti1Image(np.where(labels > 0, values, -2), np.eye(4)), tmp_path / f"cell{i}.nii.gz")
    found = assign(tmp_path, teacher, inside_of_it((3, 3)))
    assert found.families == [(0, 1, 2), (3, 4, 5)] and found.used == [0, 1]
    for i in range(2):
        labels, reliable = found.labels[i]
        np.testing.assert_array_equal(labels.numpy(), np.array([0, 3, 4, 5])[cell(i)[1]])
        assert reliable.all()


def test_nothing_to_divide_has_an_exit_code_of_its_own(tmp_path, teacher, coarse, capsys):
    inside = cell(0)[1] > 0
    nib.save(nib.Nifti1Image(inside.astype(np.float32), np.eye(4)), tmp_path / "cell.nii.gz")
    words = [
        "discovery", "--preset", "small", "--mixed-precision", "no", "--memory-format", "channels_last",
        "--objective", "assignment", "--dropout", "0", "--selection", "last", "--num-parts", "4", "--max-steps", "1",
        "--teacher", str(teacher), "--parent", str(coarse), "--dataset", str(tmp_path),
        "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(words) == 8
    assert "note: `objective` is assignment and no volume has inclusions" in capsys.readouterr().err


def test_the_start_assigns_its_own_parts_cleaned(scans, teacher):
    start = by_threshold()
    found = assign(scans, teacher, start, start, num_parts=2)
    for i in range(4):
        np.testing.assert_array_equal(found.labels[i][0].numpy() == 1, cell(i)[1] > 0)
    assert found.families == [(0, 1)]


def test_many_pieces_are_taken_to_be_alike(scans, teacher, clean_is_raw, monkeypatch):
    asked = []
    original = Assignments._from_clusters

    def noted(self, model, volume, clean, spacing, alike):
        asked.append(alike)
        found = original(self, model, volume, clean, spacing, alike)
        found.pieces = pieces
        return found

    monkeypatch.setattr(Assignments, "_from_clusters", noted)
    model = inside_of_it((1, 3))
    pieces = 5
    found = assign(scans, teacher, model, inclusions="auto")
    assert asked == [False] * 4 + [True] * 4 and found.free_order
    assert not assign(scans, teacher, model, inclusions="auto", sibling_order="size").free_order
    asked.clear()
    pieces = 2
    found = assign(scans, teacher, model, inclusions="auto")
    assert asked == [False] * 4 and not found.free_order
    assert assign(scans, teacher, model, sibling_order="free").free_order


def test_recolored_parts_keep_their_noise():
    volume, labels = (torch.from_numpy(x.astype(np.float32))[None] for x in cell(0))
    labels = labels.long()
    means = torch.tensor([[9.0, -1.0, 0.0, 2.0]])
    found = recolor(volume[:, None], labels, [(1, 2, 3)], means, torch.tensor([True]))[0, 0]
    rest = torch.stack([volume[0][labels[0] == k] - volume[0][labels[0] == k].mean() for k in (1,)])
    inside = labels[0] > 0
    spread = (
        torch.cat([volume[0][labels[0] == k] - volume[0][labels[0] == k].mean() for k in (1, 2, 3)])
        .square()
        .mean()
        .sqrt()
    )
    centre = volume[0][inside].mean()
    for part, mean in ((1, -1.0), (2, 0.0), (3, 2.0)):
        assert found[labels[0] == part].mean() == pytest.approx(float(centre + spread * mean), abs=1e-4)
    torch.testing.assert_close(found[labels[0] == 1] - found[labels[0] == 1].mean(), rest[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[~inside], volume[0][~inside])  # the background is no part of the family
    same = recolor(volume[:, None], labels, [(1, 2, 3)], means, torch.tensor([False]))
    torch.testing.assert_close(same[:, 0], volume)


def test_families_are_the_divided_parts():
    coarse = StructureDiscoveryModel(2)
    model = StructureDiscoveryModel.from_parent(coarse, (1, 3))
    assert part_families(model) == [(1, 2, 3)] and part_families(coarse) == [(0, 1)]
    finer = StructureDiscoveryModel.from_parent(model, (1, 1, 3, 3))
    finer.order_parts(torch.tensor([0.1, 0.4, 0.05, 0.02, 0.2, 0.06, 0.03, 0.01]))
    families = part_families(finer)
    assert [finer.parents[k] for k in families[0]] == [2, 2, 2] and families[0][0] < families[0][1] < families[0][2]


@pytest.fixture(scope="module")
def coarse(scans, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("coarse")
    run(config(scans, teacher, output, objective="consistency", num_parts=2, max_steps=40, learning_rate=5e-3))
    return output


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_training_on_assignments_learns_and_resumes_bit_equal(scans, teacher, coarse, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"init_from": str(coarse), "num_parts": 2, "lambda_smooth": 0.1, "max_steps": 12}
    run(config(scans, teacher, whole, **options))
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(rows[0]["assignment"] + rows[0]["smooth"], rel=1e-5)
    assert [r["step"] for r in rows if "confidence" in r] == [12]  # the last is kept: nothing to choose before
    run(config(scans, teacher, parts, **options, checkpoint_every=7, keep_checkpoints=3))
    (parts / "checkpoints" / "checkpoint-00000012" / "model.safetensors").write_bytes(b"torn")
    run(config(scans, teacher, parts, **options, checkpoint_every=7, keep_checkpoints=3, resume="latest"))
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_clustered_training_learns(scans, teacher, coarse, tmp_path):
    run(config(scans, teacher, tmp_path, parent=str(coarse), lambda_spatial=0.1, max_steps=30, learning_rate=5e-3))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(rows[0]["assignment"] + rows[0]["spatial"], rel=1e-5)
    assert np.mean([r["loss"] for r in rows[-5:]]) < 0.9 * np.mean([r["loss"] for r in rows[:5]])
    assert load_discovery(str(tmp_path)).config.num_parts == 4


def test_two_processes_assign_and_train_as_one(scans, teacher, coarse, tmp_path):
    options = {"parent": str(coarse), "max_steps": 3}
    run(config(scans, teacher, tmp_path / "one", **options))
    words = [
        "discovery", "--preset", "small", "--mixed-precision", "no", "--memory-format", "channels_last",
        "--objective", "assignment", "--dropout", "0", "--selection", "last", "--batch-size", "2", "--log-every", "1",
        "--preview-every", "0", "--max-steps", "3", "--reliable-share", "1", "--num-parts", "4",
        "--teacher", str(teacher), "--dataset", str(scans), "--parent", str(coarse),
        "--output-dir", str(tmp_path / "two"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-m", "diffdiscover3d.train", *words], check=True, env=environment, timeout=300)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_true_labels_are_numbered_as_the_parts():
    """The parent's parts are the other way round, and so must the labels be."""
    from diffdiscover3d.training import assignments

    model = inside_of_it((1, 3))
    volume, labels = cell(0)
    item = {"name": "cell", "labels": torch.from_numpy(np.stack([labels > 0, labels]).astype(np.uint8))}
    made = Assignments.__new__(Assignments)
    made.families = part_families(model)
    x = torch.from_numpy(volume)[None, None]
    x = (x - x.min()) / (x.max() - x.min())
    np.testing.assert_array_equal(made._from_labels(model, x, item).labels, labels)
    turned = inside_of_it((3, 1))
    turned.parent_model.part_order.copy_(torch.tensor([1, 0]))  # the cell is part 0 now
    made.families = part_families(turned)
    np.testing.assert_array_equal(made._from_labels(turned, x, item).labels, np.array([3, 0, 1, 2])[labels])
    with pytest.raises(ValueError, match="no true labels of 5 parts"):
        assignments._true_labels(item, 5)


def test_a_first_level_needs_a_start(scans, teacher):
    with pytest.raises(ValueError, match="--objective consistency"):
        assign(scans, teacher, StructureDiscoveryModel(2), num_parts=2)
