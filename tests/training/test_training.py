"""Both trainings on a folder of small scans: saving, resuming and sharing a batch."""

import contextlib
import itertools
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from safetensors.torch import load_file

from diffdiscover3d.data.working_grid import WorkingGrid
from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.train import main, run
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train
from diffdiscover3d.training.schedules import learning_rate_at

GRID = (10, 8, 12)
DIFFUSION = {"preset": "small", "width": 8, "sample_size": 8, "mixed_precision": "no", "batch_size": 4, "log_every": 1}
DIFFUSION["memory_format"] = "channels_last"  # fixed, because measurements vary on a busy machine


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID], indexing="ij")
    for i in range(6):
        ball = ((x**2 + y**2 + z**2) < rng.uniform(0.3, 0.8)) * rng.uniform(1, 2)
        data = (ball + rng.normal(0, 0.1, GRID)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([1, 2, 1.5, 1])), folder / f"scan{i}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def teacher(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    run(make_config(DiffusionConfig, **DIFFUSION, dataset=str(scans), output_dir=str(output), max_steps=3))
    return output


def diffusion(scans, output, **options):
    return make_config(DiffusionConfig, **{**DIFFUSION, "dataset": str(scans), "output_dir": str(output), **options})


def discovery(scans, teacher, output, **options):
    defaults = {
        "preset": "small",
        "mixed_precision": "no",
        "memory_format": "channels_last",
        "batch_size": 2,
        "num_parts": 3,
        "stages": (1, 2),
        "log_every": 1,
    }
    defaults |= {"teacher": str(teacher), "dataset": str(scans), "output_dir": str(output), "preview_every": 0}
    return make_config(DiscoveryConfig, **{**defaults, **options})


def weights(folder):
    return load_file(next(folder.rglob("diffusion_pytorch_model.safetensors")))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_near(a, b):
    """Equal up to the order of sums, which Adam's first steps amplify where a gradient is almost 0."""
    for name in a:
        # a bias before a norm over single channels has no effect, and its gradient is rounding error
        if not name.endswith(("conv1.bias", "conv2.bias")):
            assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm() + 1e-6, name


def test_diffusion_learns_and_writes_everything(scans, tmp_path):
    run(diffusion(scans, tmp_path, max_steps=40, learning_rate=3e-3, checkpoint_every=20, preview_every=20))
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 41))
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:8], rows[-8:]))
    assert last < 0.7 * first
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "checkpoint-00000020",
        "checkpoint-00000040",
    ]
    assert (tmp_path / "previews" / "samples-00000020.png").stat().st_size > 5000
    assert json.loads((tmp_path / "train_config.json").read_text())["width"] == 8
    pipe = load_teacher(str(tmp_path))
    assert pipe(torch.rand(GRID), stages=(3,)).features[0].shape == (1, 8, 4, 4, 4)
    # the saved weights are the moving average, not the last weights
    last_weights = load_file(tmp_path / "checkpoints" / "checkpoint-00000040" / "model.safetensors")
    assert any(not torch.equal(w, last_weights[k]) for k, w in weights(tmp_path).items())


def test_diffusion_resumes_bit_equal(scans, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(diffusion(scans, whole, max_steps=6, preview_every=0))
    config = diffusion(scans, parts, max_steps=6, preview_every=0, checkpoint_every=2, keep_checkpoints=3)
    run(config)
    # as if killed while saving after step 6: the log is ahead, and its last line is incomplete
    (parts / "checkpoints" / "checkpoint-00000006" / "state.json").unlink()
    with open(parts / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    run(diffusion(scans, parts, max_steps=6, preview_every=0, resume="latest"))
    assert_same(weights(whole), weights(parts))
    assert [{k: r[k] for k in ("step", "loss")} for r in log(whole)] == [
        {k: r[k] for k in ("step", "loss")} for r in log(parts)
    ]


def test_accumulation_gives_the_same_training(scans, tmp_path):
    run(diffusion(scans, tmp_path / "one", max_steps=3, preview_every=0))
    run(diffusion(scans, tmp_path / "four", max_steps=3, preview_every=0, gradient_accumulation_steps=4))
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "four"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert_near(weights(tmp_path / "one"), weights(tmp_path / "four"))


def test_checkpoints_are_protected(scans, tmp_path):
    run(diffusion(scans, tmp_path, max_steps=2, preview_every=0))
    with pytest.raises(ModelError, match="--resume latest"):
        run(diffusion(scans, tmp_path, max_steps=2))
    with pytest.raises(ModelError, match="learning_rate was"):
        run(diffusion(scans, tmp_path, max_steps=2, learning_rate=0.5, resume="latest"))
    with pytest.raises(ModelError, match="width was 8"):
        run(diffusion(scans, tmp_path, max_steps=2, width=16, resume="latest"))


def test_a_loss_that_is_not_finite_stops_the_training(scans, tmp_path):
    class Broken(DiffusionTraining):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            return {"loss": losses["loss"] * (float("nan") if self.model.training and self.steps() >= 3 else 1)}

        def steps(self):
            return self.ema.optimization_step

    config = diffusion(scans, tmp_path, max_steps=30, checkpoint_every=3, preview_every=0)
    from diffdiscover3d.data.loading import load_volumes

    with pytest.raises(ModelError, match="not finite since step 4"):
        train(Broken(config, GRID), config, load_volumes(str(scans)), make_accelerator(config))
    tensors = load_file(tmp_path / "checkpoints" / "checkpoint-00000003" / "model.safetensors")
    assert all(torch.isfinite(w).all() for w in tensors.values())


def test_discovery_learns_and_finds_parts(scans, teacher, tmp_path):
    run(discovery(scans, teacher, tmp_path, max_steps=30, learning_rate=5e-3, preview_every=30))
    rows = log(tmp_path)
    assert {"loss", "feature", "visual", "invariance"} <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(
        sum(rows[0][k] for k in ("feature", "visual", "invariance", "denoised")), rel=1e-5
    )
    assert np.mean([r["loss"] for r in rows[-5:]]) < np.mean([r["loss"] for r in rows[:5]])
    assert sum("confidence" in r for r in rows) == 10  # epochs of 3 steps
    assert (tmp_path / "previews" / "parts-00000030.png").stat().st_size > 5000
    model = load_discovery(str(tmp_path))
    from diffdiscover3d.data.loading import load_volumes

    probabilities = torch.stack([model.segment(v["volume"][None]).probabilities[0] for v in load_volumes(str(scans))])
    kept = json.loads((tmp_path / "selection.json").read_text())
    assert kept["kept_step"] % 3 == 0 and kept["mean_confidence"] == max(r.get("confidence", 0) for r in rows)
    sizes = probabilities.mean(dim=(0, 2, 3, 4))
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


@pytest.mark.parametrize("options", [{}, {"lambda_denoised": 0.0, "num_noise": 2, "relative_consistency": False}])
def test_discovery_resumes_bit_equal(scans, teacher, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(discovery(scans, teacher, whole, max_steps=7, **options))
    run(discovery(scans, teacher, parts, max_steps=7, checkpoint_every=5, keep_checkpoints=3, **options))
    last = parts / "checkpoints" / "checkpoint-00000007"
    (last / "model.safetensors").write_bytes(b"torn")
    run(discovery(scans, teacher, parts, max_steps=7, resume="latest", **options))
    assert_same(weights(whole), weights(parts))  # including dropout, batch statistics and the selected epoch


def test_nested_discovery_resumes_bit_equal(scans, teacher, tmp_path):
    run(discovery(scans, teacher, tmp_path / "coarse", max_steps=3, num_parts=2))
    options = {"parent": str(tmp_path / "coarse"), "num_parts": 4, "teacher_noise": "fixed", "selection": "last"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(discovery(scans, teacher, whole, max_steps=7, **options))
    run(discovery(scans, teacher, parts, max_steps=7, checkpoint_every=5, keep_checkpoints=3, **options))
    (parts / "checkpoints" / "checkpoint-00000007" / "model.safetensors").write_bytes(b"torn")
    run(discovery(scans, teacher, parts, max_steps=7, resume="latest", **options))
    assert_same(weights(whole), weights(parts))
    assert json.loads((parts / "selection.json").read_text())["kept_step"] == 7
    for name in ("config.json", "selection.json"):
        assert (parts / name).read_text() == (whole / name).read_text()


def test_children_chosen_otherwise_are_not_resumed(scans, teacher, tmp_path, monkeypatch):
    run(discovery(scans, teacher, tmp_path / "coarse", max_steps=1, num_parts=2))
    options = {"parent": str(tmp_path / "coarse"), "num_parts": 4, "max_steps": 1}
    monkeypatch.setattr("diffdiscover3d.training.discovery.choose_children", lambda *_: (1, 3))
    run(discovery(scans, teacher, tmp_path / "out", **options))
    run(discovery(scans, teacher, tmp_path / "out", **options, resume="latest"))
    # as if chosen on another machine; the weights have the same shapes
    monkeypatch.setattr("diffdiscover3d.training.discovery.choose_children", lambda *_: (3, 1))
    with pytest.raises(ModelError, match=r"into \[1, 3\], this one into \[3, 1\]; give --children 1 3"):
        run(discovery(scans, teacher, tmp_path / "out", **options, resume="latest"))
    run(discovery(scans, teacher, tmp_path / "out", **options, resume="latest", children=(1, 3)))


def test_a_confidence_that_is_not_finite_is_never_the_best(scans, teacher, tmp_path, monkeypatch):
    confidences = iter([float("nan"), 0.6, float("inf"), 0.5])
    monkeypatch.setattr(DiscoveryTraining, "mean_confidence", lambda self: next(confidences))
    run(discovery(scans, teacher, tmp_path / "out", max_steps=12))  # epochs of 3 steps
    assert json.loads((tmp_path / "out" / "selection.json").read_text()) == {"kept_step": 6, "mean_confidence": 0.6}
    monkeypatch.setattr(DiscoveryTraining, "mean_confidence", lambda self: float("nan"))
    with pytest.raises(ModelError, match=r"confidence was not finite.*--learning-rate"):
        run(discovery(scans, teacher, tmp_path / "none", max_steps=3))
    assert not (tmp_path / "none" / "config.json").exists()


def test_scans_of_different_shapes_are_brought_to_one(scans, teacher, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, shape in enumerate([(10, 8, 12), (14, 8, 10), (12, 9, 11)]):
        data = np.random.default_rng(i).random(shape, dtype=np.float32)
        nib.save(nib.Nifti1Image(data, np.eye(4)), mixed / f"{i}.nii.gz")
    run(discovery(mixed, teacher, tmp_path / "f", max_steps=2, batch_size=3))
    run(diffusion(mixed, tmp_path / "d", max_steps=2, preview_every=2))
    with pytest.raises(ValueError, match="--volume-size"):
        run(diffusion(mixed, tmp_path / "e", max_steps=2, pad=True, sample_size=None))
    with pytest.raises(ValueError, match="requires --pad"):
        run(diffusion(mixed, tmp_path / "h", max_steps=2, volume_size=9))
    run(diffusion(mixed, tmp_path / "g", max_steps=2, pad=True, sample_size=None, volume_size=9, preview_every=0))
    assert load_teacher(str(tmp_path / "g")).unet.config.sample_size is None


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
def test_a_preview_leaves_the_weights_as_they_were(scans, tmp_path, monkeypatch, error):
    """Previews use the averaged weights; the training weights are restored afterwards, also on errors."""
    from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline

    task = DiffusionTraining(diffusion(scans, tmp_path), GRID)
    task.model.train()
    with torch.no_grad():
        for weight in task.model.parameters():
            weight.add_(1.0)
    own = [p.clone() for p in task.model.parameters()]
    seen, real = [], VolumeGenerationPipeline.__call__

    def sampled(pipeline, *arguments, **options):
        seen.extend(p.clone() for p in pipeline.unet.parameters())
        if error:
            raise error
        return real(pipeline, *arguments, **options)

    monkeypatch.setattr(VolumeGenerationPipeline, "__call__", sampled)
    with pytest.raises(RuntimeError) if error else contextlib.nullcontext():
        task.preview(1, tmp_path)
    for averaged, before, after in zip(seen, own, task.model.parameters(), strict=True):
        torch.testing.assert_close(averaged + 1, before)
        assert torch.equal(before, after)
    assert task.model.training


def test_schedules():
    constant = make_config(DiffusionConfig)
    assert learning_rate_at(constant, 0) == learning_rate_at(constant, 49_999) == 1e-4
    cycle = make_config(DiffusionConfig, preset="small", max_steps=100, learning_rate=1.0)
    rates = [learning_rate_at(cycle, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1
    assert rates[55] == pytest.approx(0.5005, abs=1e-6) and rates[-1] < 0.002
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def launch(arguments, processes, **environment):
    command = [sys.executable, "-m"]
    if processes > 1:
        command += [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
        ]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    command += ["diffdiscover3d.train", *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_two_processes_train_as_one(scans, tmp_path):
    for processes in (1, 2):
        options = {**DIFFUSION, "dataset": scans, "output_dir": tmp_path / str(processes), "max_steps": 5}
        # the first process measures, and all use its result
        options |= {"preview_every": 0, "memory_format": "auto"}
        flags = [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), v)]
        done = launch(["diffusion", *flags], processes)
        assert done.returncode == 0, done.stderr
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    assert len(one) == len(two) == 5  # a single log for all processes
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert_near(weights(tmp_path / "1"), weights(tmp_path / "2"))


def test_processes_that_do_not_work_together_are_refused(scans, tmp_path):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29578"}
    done = launch(
        ["diffusion", "--dataset", scans, "--output-dir", tmp_path], 1, **launched, ACCELERATE_USE_CPU="false"
    )
    assert done.returncode == 2 and "ACCELERATE_USE_CPU" in done.stderr and list(tmp_path.iterdir()) == []


def test_trackers(scans, tmp_path, monkeypatch):
    config = diffusion(scans, tmp_path, max_steps=2, preview_every=0, report_to="tensorboard")
    run(config)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    rows = {}

    class Recorder(GeneralTracker):
        """In place of a service on the network."""

        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, run_name, **_):
            super().__init__()

        def store_init_configuration(self, values):
            rows["config"] = values

        def log(self, values, step=None, **_):
            rows[step] = values

    with monkeypatch.context() as patched:
        patched.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
        patched.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD, LoggerType.WANDB])
        both = diffusion(scans, tmp_path / "both", max_steps=2, preview_every=0, report_to="tensorboard,wandb")
        run(both)
    assert list((tmp_path / "both").rglob("events.out.tfevents*"))
    assert rows["config"]["max_steps"] == 2 and rows[2]["loss"] == log(tmp_path / "both")[-1]["loss"]
    # accelerate ignores trackers that are not installed
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: False)
    arguments = ["diffusion", "--dataset", str(scans), "--report-to", "wandb", "--output-dir", str(tmp_path / "w")]
    assert main(arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["diffusion", "--dataset", "no-such-folder"], 3, "no-such-folder"),
        (["diffusion", "--max-steps", "0"], 2, "max_steps"),
        (["diffusion", "--config", "absent.yaml"], 3, "absent.yaml"),
        (["discovery", "--teacher", "nowhere"], 5, "nowhere"),
        (["discovery"], 2, "--teacher"),
    ],
)
def test_errors_are_one_line_and_their_code(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_losses_are_the_papers_equations(scans, teacher, tmp_path):
    """The loss terms of one step against Eq. 4 to 8 computed directly from the teacher and the network."""
    from diffdiscover3d.data.loading import load_volumes
    from diffdiscover3d.training.discovery import DiscoveryTraining

    config = discovery(
        scans, teacher, tmp_path, relative_consistency=False, lambda_denoised=0.0, invert_probability=1.0, dropout=0.0
    )
    volumes = load_volumes(str(scans))
    task = DiscoveryTraining(config, load_teacher(str(teacher)), volumes, volumes, make_accelerator(config))
    model = task.model.eval()
    volume = volumes[0]["volume"]
    draw = task.draw(volume, torch.Generator().manual_seed(0))
    batch = {"volume": volume[None], **{k: v[None] for k, v in draw.items()}}
    terms = task.losses(model, task.prepare(batch))
    with torch.no_grad():
        masks = model(volume[None]).logits.softmax(dim=1)[0]
        changed = model(1 - volume[None] ** draw["gamma"]).logits.softmax(dim=1)[0]
        upsampled = task.teacher.extract(volume[None], draw["noise"][None].movedim(1, 0), 25, (1, 2)).features
        phi = torch.cat(
            [torch.nn.functional.interpolate(f, GRID, mode="trilinear", align_corners=True) for f in upsampled], 1
        )

    def consistency(h):
        z = [(m * h).sum(dim=(1, 2, 3)) / m.sum() for m in masks]
        return (
            sum((m * (z_k[:, None, None, None] - h) ** 2).sum() for m, z_k in zip(masks, z, strict=True))
            / masks[0].numel()
        )

    torch.testing.assert_close(terms["feature"], consistency(phi[0]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(terms["visual"], consistency(volume), rtol=1e-3, atol=1e-5)
    dice = 2 * (masks * changed).sum() / ((masks**2).sum() + (changed**2).sum())
    torch.testing.assert_close(terms["invariance"], 1 - dice, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(terms["loss"], terms["feature"] + terms["visual"] + terms["invariance"])


def test_the_most_confident_epoch_is_kept(scans, teacher, tmp_path):
    run(discovery(scans, teacher, tmp_path, max_steps=30, learning_rate=2e-2, lr_schedule="constant"))
    confidences = [row["confidence"] for row in log(tmp_path) if "confidence" in row]
    model = load_discovery(str(tmp_path))
    from diffdiscover3d.data.loading import load_volumes

    kept = np.mean([model.segment(v["volume"][None]).probabilities.amax(1).mean() for v in load_volumes(str(scans))])
    assert kept == pytest.approx(max(confidences), abs=1e-4)


def test_averages_take_the_memory_format_of_the_weights(scans, tmp_path):
    """Otherwise a GPU would update them tensor by tensor."""
    task = DiffusionTraining(diffusion(scans, tmp_path), GRID)
    task.model.to(memory_format=torch.channels_last_3d)
    start = [p.detach().clone() for p in task.model.parameters()]
    for resumed in (False, True):
        if resumed:
            task.load_state(task.state())
            task.ema.shadow_params = [s.contiguous() for s in task.ema.shadow_params]
        with torch.no_grad():
            for weight in task.model.parameters():
                weight.add_(1.0)
        expected = [s.clone() for s in task.ema.shadow_params]
        task.after_step(1)
        decay = task.ema.cur_decay_value
        for average, before, weight in zip(task.ema.shadow_params, expected, task.model.parameters(), strict=True):
            assert average.stride() == weight.stride()
            torch.testing.assert_close(average, decay * before + (1 - decay) * weight.detach())
    assert not torch.equal(task.ema.shadow_params[0], start[0])


class OwnGrids(list):
    """Volumes that keep their own grids."""

    working_grid = WorkingGrid(spacing=(1.0, 1.0, 1.0))


def test_graphs_are_for_batches_of_one_shape(teacher, tmp_path):
    shapes = {"one": [(16, 12, 8)] * 2, "two": [(16, 12, 8), (8, 12, 16)]}
    for name, options, one_shape in (
        ("one", {}, True), ("two", {}, False), ("two", {"volume_size": (16, 12, 8)}, True),
    ):  # fmt: skip
        volumes = OwnGrids({"volume": torch.rand(1, *s), "spacing_mm": (1.0, 1.0, 1.0)} for s in shapes[name])
        fixed = {"preset": "small", "num_parts": 2, "stages": (1,), "teacher": str(teacher), "mixed_precision": "no"}
        config = make_config(DiscoveryConfig, **fixed, output_dir=str(tmp_path), spacing=(1.0, 1.0, 1.0), **options)
        network = StructureDiscoveryModel(2, spacing=(1.0, 1.0, 1.0))
        accelerator = make_accelerator(config)
        task = DiscoveryTraining(config, load_teacher(str(teacher)), volumes, volumes, accelerator, start=network)
        assert task.has_one_shape == one_shape and task.suits_graphs
        task.model = StructureDiscoveryModel(2, scaling="robust")
        assert not task.suits_graphs
