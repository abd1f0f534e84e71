"""`discover`: the rules of its plan, and a complete run on tiny scans."""

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.working_grid import resampled_shape
from diffdiscover3d.errors import InputError, ModelError, NothingToDivideError, OutputError
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.train import run
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.recipes import Training
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.workflows import discover as module
from diffdiscover3d.workflows import discover_plan as discovery_plan
from diffdiscover3d.workflows.discover import discover
from diffdiscover3d.workflows.discover_plan import (
    PRESETS,
    describe_plan,
    make_fallback,
    make_plan,
    make_recipe,
    read_plan,
)
from diffdiscover3d.workflows.discover_scans import DiscoverRun
from tests.helpers.loading import counted_loads

PLENTY = 2**40


def plan(shapes, preset="standard", memory=PLENTY, **options):
    return make_plan(shapes, [(1, 1, 2)] * len(shapes), [f"s{i}" for i in range(len(shapes))], preset=preset,
                     memory_bytes=memory, **options)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(50, 50, 50), (512, 512, 40), (9, 8, 7), (320, 320, 36)])
def test_grids_follow_the_scans(preset, shape):
    found = plan([shape] * 5, preset)
    grid, options = found.diffusion_grid, PRESETS[preset]
    assert all(n % 8 == 0 and n >= 8 for n in grid)
    assert math.prod(grid) <= 1.6 * max(options["grid"], 8) ** 3  # rounding to multiples of 8 included
    working = resampled_shape(shape, (1, 1, 2), found.spacing)
    assert math.prod(working) <= options["volume"] ** 3
    if math.prod(shape) <= options["volume"] ** 3:
        assert working == shape and found.spacing == (1, 1, 2)
    else:  # as fine as allowed: 3% less in every direction would be too fine
        assert math.prod(resampled_shape(shape, (1, 1, 2), np.array(found.spacing) / 1.06)) > options["volume"] ** 3
        assert max(found.spacing) / min(found.spacing) <= 2.1
    assert found.diffusion_steps == options["diffusion"]
    quick = preset == "quick"  # one round of assignments less at levels 1 and 2
    assert [len(steps) for steps in found.discovery_steps] == ([4, 1, 1] if quick else [5, 2, 1])
    steps = 1_000 + 600 + 600 + 1_200 + 1_000 + (0 if quick else 800 + 1_200)
    assert sum(map(sum, found.discovery_steps)) == options["first"] + options["rounds"] * steps


def test_mixed_shapes_of_one_spacing_are_not_resampled():
    found = plan([(40, 50, 30), (42, 52, 32), (60, 70, 50)])
    assert found.median_shape == (42, 52, 32) and found.median_spacing_mm == found.spacing == (1, 1, 2)
    assert "3 scans, typically 42×52×32 voxels of 1×1×2 mm" in describe_plan(found)
    assert "parts on voxels of 1×1×2 mm" in describe_plan(found)


def test_the_target_spacing_of_a_plan_reaches_every_training():
    shapes, options = [(40, 50, 30), (80, 100, 30)], {"preset": "quick", "memory_bytes": PLENTY, "levels": 3}
    found = make_plan(shapes, [(2, 2, 3), (1, 1, 3)], ["a", "b"], **options, spacing=(2, 2, 4))
    assert (found.spacing, found.spacing_unit) == ((2, 2, 4), "mm")
    recipe = make_recipe(found)
    steps = [recipe.diffusion, *(step for steps in recipe.levels.values() for step in steps)]
    steps += [step for steps in make_fallback(found).levels.values() for step in steps]
    assert len(steps) > 8 and all((s["spacing"], s["spacing_unit"]) == ((2, 2, 4), "mm") for s in steps)
    unknown = make_plan(shapes, [(1, 1, 1)] * 2, ["a", "b"], **options, spacing_unit="voxel")
    assert unknown.spacing == pytest.approx((1.03**3,) * 3, rel=0.2) and "of unknown size" in describe_plan(unknown)
    assert math.prod(np.median([resampled_shape(s, (1, 1, 1), unknown.spacing) for s in shapes], axis=0)) <= 50**3


def test_little_memory_shrinks_batch_then_grid():
    plenty, some, little = (plan([(64, 64, 64)] * 8, memory=m) for m in (PLENTY, 3 * 2**30, 2**29))
    assert plenty.batch_size == 4 and some.batch_size < 4 and little.batch_size == 1
    assert some.diffusion_grid == plenty.diffusion_grid > little.diffusion_grid
    assert math.prod(little.diffusion_grid) * discovery_plan._BYTES_PER_VOXEL <= 2**28
    assert plan([(64, 64, 64)]).batch_size == 1  # at most the number of scans


def test_a_plan_of_another_recipe_is_not_resumed(tmp_path):
    found = plan([(20, 20, 20)])
    write_json(tmp_path / "plan.json", asdict(found))
    assert read_plan(tmp_path / "plan.json") == found
    older = {k: v for k, v in asdict(found).items() if not k.startswith("spacing")} | {"working_grid": [9, 9, 9]}
    unnamed = {k: v for k, v in asdict(found).items() if k != "recipe"}
    for values in ({**asdict(found), "recipe": "0" * 64}, unnamed, older):
        write_json(tmp_path / "plan.json", values)
        with pytest.raises(ModelError, match="another version of diffdiscover3d"):
            read_plan(tmp_path / "plan.json")


def test_a_level_without_inclusions_is_divided_by_its_intensities(tmp_path, monkeypatch):
    trained, lines = [], []

    def train(training, *_):
        if training.options.get("objective") == "assignment" and training.folder.name.startswith("level2"):
            raise NothingToDivideError("no volume has inclusions to assign.")
        trained.append((training.folder.name, training.options))

    monkeypatch.setattr(module, "_train", train)
    monkeypatch.setattr(module, "_take_over", lambda *_: None)
    monkeypatch.setattr("diffdiscover3d.training.recipes.final_loss", lambda folder: 0.0)
    found = plan([(120, 100, 90)] * 3)
    run = DiscoverRun(found, {}, tmp_path, "cpu", torch.device("cpu"), verbose=False, volumes={})
    monkeypatch.setattr(module, "check_unchanged", lambda *_: None)
    module._train_all(run, lines.append)
    names = [name for name, _ in trained]
    assert names[-2:] == ["level2", "level3"] and "level2-step1" not in names
    level2, level3 = (options for _, options in trained[-2:])
    assert level2.get("objective", "consistency") == "consistency" and level2["max_steps"] == 400
    assert level2["spacing"] == found.spacing and Path(level2["parent"]).name == "level1"
    assert level3["objective"] == "assignment" and level3["inclusions"] == "auto"
    assert any("no inclusions" in line for line in lines)


def test_bad_options():
    with pytest.raises(ValueError, match="preset"):
        plan([(8, 8, 8)], "slow")
    with pytest.raises(ValueError, match="levels"):
        plan([(8, 8, 8)], levels=4)


@pytest.fixture
def scans(tmp_path, make_nifti):
    rng = np.random.default_rng(0)
    for i in range(3):
        values = rng.normal(0, 0.1, (18, 16, 14 + i)).astype(np.float32)
        values[4:12, 4:11, 3:10] += 1
        make_nifti(tmp_path / "in" / f"s{i}.nii.gz", values)
    return tmp_path / "in"


def test_folder_without_a_readable_scan(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"<html>")
    errors = []
    with pytest.raises(InputError, match="none of the scans"):
        discover(tmp_path / "in", tmp_path / "out", on_error=errors.append)
    assert len(errors) == 1 and not (tmp_path / "out").exists()


def few_steps(monkeypatch):
    """Every training in this process, of a step or two."""
    few = {**PRESETS["quick"], "grid": 16, "diffusion": 2, "first": 1, "rounds": 0.001}
    monkeypatch.setitem(PRESETS, "quick", few)

    def train(training, result, *_):
        kind = {"diffusion": DiffusionConfig, "discovery": DiscoveryConfig}[training.phase]
        options = {**training.options, "mixed_precision": "no", "memory_format": "channels_last", "preview_every": 0}
        if not (training.folder / result).exists():
            run(make_config(kind, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
                            output_dir=str(training.folder)))  # fmt: skip

    monkeypatch.setattr(module, "_train", train)


def test_volumes_in_memory(tmp_path, monkeypatch):
    """Arrays, images of nibabel and of SimpleITK: the results are on their grids and at their places in space."""
    sitk = pytest.importorskip("SimpleITK")
    few_steps(monkeypatch)
    rng = np.random.default_rng(0)
    array = rng.normal(0, 0.1, (14, 12, 10)).astype(np.float32)
    array[4:10, 4:9, 3:8] += 1
    affine = np.array([[0, 0, 2, 5], [-1.5, 0, 0, 3], [0, -1.5, 0, 1], [0, 0, 0, 1.0]])
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing((2.0, 1.5, 1.5)), image.SetOrigin((7.0, -3.0, 1.0))
    results = discover(
        [nib.Nifti1Image(array, affine), image], tmp_path / "images", preset="quick", levels=1, device="cpu"
    )
    assert len(results) == 2 and (tmp_path / "images" / "index.html").exists()
    lps = np.array([[-2.0, 0, 0, -7], [0, -1.5, 0, 3], [0, 0, 1.5, 1], [0, 0, 0, 1]])
    for result, expected in zip(results, (affine, lps), strict=True):
        found = nib.load(result.labels)
        assert found.shape == (14, 12, 10) and np.allclose(found.affine, expected, atol=1e-5)
    config = json.loads((tmp_path / "images" / "model" / "discovery" / "config.json").read_text())
    assert (config["spacing"], config["spacing_unit"]) == ([2, 1.5, 1.5], "mm")
    # arrays have no voxel size, so lengths are counted in voxels
    discover(
        [array, torch.from_numpy(array[:, ::-1].copy())], tmp_path / "arrays", preset="quick", levels=1, device="cpu"
    )
    model = tmp_path / "arrays" / "model"
    config = json.loads((model / "discovery" / "config.json").read_text())
    assert (config["spacing"], config["spacing_unit"]) == ([1, 1, 1], "voxel")
    labels = np.load(tmp_path / "arrays" / "parts" / "scan-000_dseg.npy")
    np.testing.assert_array_equal(segment(array, model=str(model)), labels)
    with pytest.raises(ValueError, match="`spacing` needs the voxel size of every scan"):
        discover([array], tmp_path / "other", preset="quick", spacing="2mm")


def test_links_keep_their_names(scans, tmp_path, monkeypatch):
    """Links to files that are named by a hash, with an ending (git-annex) or without (the Hub's cache)."""
    few_steps(monkeypatch)
    folder = tmp_path / "snapshots" / "main"
    for number, scan in enumerate(sorted(scans.iterdir())[:2]):
        key = f"SHA256E-s{scan.stat().st_size}--{hashlib.sha256(scan.read_bytes()).hexdigest()}.nii.gz"
        stored = (folder / ".git" / "annex" / "objects" / key / key, tmp_path / "blobs" / key[-71:-7])[number]
        link = folder / f"sub-{number}" / "T1w.nii.gz"
        for path in (link, stored):
            path.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(scan.rename(stored), link.parent))
    options = {"preset": "quick", "levels": 1, "device": "cpu"}
    results = discover(folder, tmp_path / "out", **options)
    names = [path.relative_to(tmp_path / "out" / "parts").as_posix() for path in sorted(r.labels for r in results)]
    assert names == ["sub-0/T1w_dseg.nii.gz", "sub-1/T1w_dseg.nii.gz"]
    assert (tmp_path / "out" / "index.html").read_text().count("_report.html") == 2
    # the same scans, written in another way
    monkeypatch.chdir(folder.parent)
    assert discover("../snapshots/main", tmp_path / "out", resume=True, **options) == []


def test_without_an_output_nothing_is_left_behind(scans, tmp_path, monkeypatch):
    """Models and label maps come back in memory, of every kind of volume, and the models can be saved and used."""
    sitk = pytest.importorskip("SimpleITK")
    few_steps(monkeypatch)
    kept = tmp_path / "temporary"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    before, lines = sorted(tmp_path.rglob("*")), []
    image = nib.load(scans / "s1.nii.gz")
    array = np.asarray(image.dataobj)
    picture = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    volumes = [scans / "s0.nii.gz", image, picture]
    loads, bars, real = counted_loads(monkeypatch), [], module.segment

    def recorded(*arguments, progress, **options):
        bars.append(progress)
        return real(*arguments, progress=progress, **options)

    monkeypatch.setattr(module, "segment", recorded)
    found = discover(volumes, preset="quick", levels=2, device="cpu", progress=True, on_step=lines.append)
    assert bars == [True] * 3
    # trainings load those of their own folders; the result is loaded once for all scans and for the output
    assert len([source for source in loads if source.endswith("model/discovery")]) == 1
    assert sorted(tmp_path.rglob("*")) == before and lines[-1].startswith("Step 4 of 4")
    assert [network.config.num_parts for network in found.model.levels] == [2, 4] and not found.model.training
    assert not found.pipeline.unet.training and found.domain["scans"] == 3
    assert [list(levels) for levels in found.labels] == [[1, 2]] * 3
    one, two, three = (levels[2] for levels in found.labels)
    assert isinstance(one, nib.Nifti1Image) and one.shape == (18, 16, 14)
    assert isinstance(two, nib.Nifti1Image) and np.array_equal(two.affine, image.affine)
    assert isinstance(three, sitk.Image) and three.GetSize() == array.shape
    found.save_pretrained(tmp_path / "model")
    again = segment(volumes, model=str(tmp_path / "model"), level="all")
    for levels, expected in zip(again, found.labels, strict=True):
        for level, labels in levels.items():
            pair = (labels, expected[level])
            pair = [sitk.GetArrayFromImage(x) if isinstance(x, sitk.Image) else np.asarray(x.dataobj) for x in pair]
            assert np.array_equal(*pair)
    load_teacher(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="`resume` continues the run of an `output`"):
        discover(volumes, resume=True)


def test_one_array_and_an_interruption(tmp_path, monkeypatch):
    kept = tmp_path / "temporary"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    array = np.random.default_rng(0).normal(0, 0.1, (14, 12, 10)).astype(np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            discover(array, preset="quick", device="cpu")
    assert list(kept.iterdir()) == []


@pytest.mark.slow
def test_from_scans_to_pictures_and_resumed(scans, tmp_path, monkeypatch, make_nifti):
    monkeypatch.setitem(PRESETS, "quick", {**PRESETS["quick"], "grid": 16, "diffusion": 3, "first": 2, "rounds": 0.005})
    out, lines = tmp_path / "out", []
    options = {"preset": "quick", "levels": 2, "device": "cpu", "on_step": lines.append}
    real, stages = module._train, []

    def stop_before_level_2(training, *rest):
        stages.append(training.folder.name)
        if training.folder.name in ("level1-step1-start2", "level2") and stages.count(training.folder.name) == 1:
            raise KeyboardInterrupt
        real(training, *rest)

    monkeypatch.setattr(module, "_train", stop_before_level_2)
    with pytest.raises(KeyboardInterrupt):
        discover(scans, out, **options)
    with pytest.raises(OutputError, match="--resume"):
        discover(scans, out, **options)
    starts = ["diffusion", "level1-step1", "level1-step1-start2"]
    assert stages == starts
    with pytest.raises(KeyboardInterrupt):
        discover(scans, out, resume=True, **options)
    assert (
        stages == [*starts, *starts, "level1-step2", "level1-step3", "level1", "level2"]
        and not (out / "model").exists()
    )
    finished = (out / "training" / "level1" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    results = discover(scans, out, resume=True, **options)
    assert finished == (out / "training" / "level1" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert len(results) == 3 and [list(r.levels) for r in results] == [[1, 2]] * 3
    assert (out / "index.html").read_text().count("_report.html") == 3
    config = json.loads((out / "model" / "discovery" / "config.json").read_text())
    spacing = list(read_plan(out / "plan.json").spacing)
    assert spacing == config["spacing"] == config["parent"]["spacing"] == [2, 2, 3] and config["spacing_unit"] == "mm"
    assert any(line.startswith("Step 4 of 4") for line in lines)
    assert sum(line.startswith("Of 2 starts level1-step1") for line in lines) == 2
    for folder in (*starts, "level1", "level2"):
        assert (out / "training" / folder / "losses.png").exists()
    assert sorted(p.name for p in (out / "model").iterdir()) == ["diffusion", "discovery"]
    assert not list((out / "model").rglob("checkpoints"))
    # one network with both levels: every fine part is nested in the coarse one that it divides
    coarse, fine = load_discovery(str(out / "model")).levels
    assert (coarse.config.num_parts, fine.config.num_parts) == (2, 4)
    one, two = (np.asarray(nib.load(results[0].levels[level].labels).dataobj) for level in (1, 2))
    assert (np.array(fine.parents)[two] == one).all()
    load_teacher(str(out / "model"))
    make_nifti(scans / "new.nii.gz", np.random.default_rng(5).normal(size=(9, 8, 7)).astype(np.float32))
    with pytest.raises(ModelError, match="other scans"):
        discover(scans, out, resume=True, **options)


def stop(*_):
    raise KeyboardInterrupt


def test_a_scan_changed_since_the_run_began(scans, tmp_path, monkeypatch):
    """Same size, same ends, same modification time."""
    monkeypatch.setattr(module, "_train", stop)
    folder = scans.rename(tmp_path / "study #1")
    options = {"preset": "quick", "levels": 1, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        discover(folder, tmp_path / "out", **options)
    # what the trainings read
    assert list_volumes(tmp_path / "out" / "scans.json") == sorted(folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        discover(folder, tmp_path / "out", resume=True, **options)
    with pytest.raises(ModelError, match="read with the options"):
        discover(folder, tmp_path / "out", resume=True, nan_to_zero=True, **options)
    path, kept = folder / "s1.nii.gz", (folder / "s1.nii.gz").stat()
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[8, 8, 7] += 0.25
    nib.save(nib.Nifti1Image(values, image.affine), path)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    with pytest.raises(InputError, match=r"s1\.nii\.gz: has changed since this run began; restore it"):
        discover(folder, tmp_path / "out", resume=True, **options)


def test_a_scan_that_changes_between_two_trainings(scans, tmp_path, monkeypatch):
    children = []

    def train(command, environment):
        options = json.loads(Path(command[command.index("--config") + 1]).read_text())
        children.append(options)
        (Path(options["output_dir"]) / "model_index.json").touch()
        (scans / "s0.nii.gz").write_bytes((scans / "s2.nii.gz").read_bytes())
        return 0, False

    monkeypatch.setattr(module, "run_child", train)
    with pytest.raises(InputError, match=r"s0\.nii\.gz: has changed since this run began"):
        discover(scans, tmp_path / "out", preset="quick", device="cpu", nan_to_zero=True)
    assert [options["nan_to_zero"] for options in children] == [True]


@pytest.mark.parametrize(("visible", "index", "expected"), [(None, 1, "1"), ("2,5", 1, "5"), ("GPU-7", 0, "GPU-7")])
def test_trainings_run_on_the_device_that_was_chosen(visible, index, expected, tmp_path, monkeypatch):
    environments = []
    monkeypatch.setattr(
        module, "run_child", lambda command, environment: environments.append(environment) or (0, False)
    )
    monkeypatch.setattr(module, "check_unchanged", lambda plan: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    training = Training("diffusion", {}, tmp_path / "diffusion")
    module._train(training, "model_index.json", torch.device("cuda", index), False, None)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == [expected]


def test_results_that_collide_are_refused_before_the_trainings(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_train", stop)
    for number in (1, 2):
        (tmp_path / "study" / f"sub-{number}").mkdir(parents=True)
        (scans / f"s{number}.nii.gz").rename(tmp_path / "study" / f"sub-{number}" / "T1w.nii.gz")
    with pytest.raises(KeyboardInterrupt):  # the results keep the folders
        discover(tmp_path / "study", tmp_path / "out", preset="quick", device="cpu")
    nib.save(nib.load(scans / "s0.nii.gz"), tmp_path / "study" / "sub-1" / "T1w.nii")
    with pytest.raises(OutputError, match="would both write"):
        discover(tmp_path / "study", tmp_path / "new", preset="quick", device="cpu")
    assert not (tmp_path / "new" / "training").exists()
