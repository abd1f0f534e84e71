"""Whole trainings on a simulated GPU: their steps replayed as CUDA graphs are the eager ones."""

import pytest
import torch

from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.training.brain_run import train_brain
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train
from tests.helpers.simulated_gpu import simulated_gpu
from tests.helpers.tiny_trainings import (
    GRID,
    STEPS,
    Volumes,
    brain_config,
    losses_in,
    make_diffusion,
    make_discovery,
    make_nested,
)

REPLAYED = 3  # the first three steps are eager


@pytest.fixture
def gpu(monkeypatch):
    with simulated_gpu(monkeypatch) as found:
        yield found


def run(kind, folder, make_task, **options):
    """The losses of a training, and its weights."""
    fixed = {"preset": "small", "max_steps": STEPS, "log_every": 1, "preview_every": 0, "batch_size": 2}
    config = make_config(kind, **{**fixed, "mixed_precision": "no", "output_dir": str(folder), **options})
    accelerator = make_accelerator(config)
    task = make_task(config, accelerator)
    train(task, config, Volumes(), accelerator)
    return losses_in(folder), torch.cat([p.detach().cpu().flatten() for p in task.model.parameters()])


def compare(gpu, folder, kind, make_task, operators, **options):
    """Train eagerly and as by default, and compare; one graph of so many operators is captured and replayed.

    The last replay follows a checkpoint.
    """
    options = {"checkpoint_every": 5, "preview_every": 5 if kind is DiscoveryConfig else 0, **options}
    eager = run(kind, folder / "eager", make_task, cuda_graphs=False, **options)
    assert not gpu.graphs and eager[0].isfinite().all()
    graphed = run(kind, folder / "graphed", make_task, **options)
    (graph,) = gpu.graphs
    assert graph.replays == REPLAYED
    assert 0.9 * operators < len(graph.calls) <= operators  # kernels that a GPU launches, more or less
    torch.testing.assert_close(graphed, eager)


def make_robust(config, accelerator):
    torch.manual_seed(1)
    start = StructureDiscoveryModel(3, norm="instance", dropout=0.0, scaling="robust")
    return make_discovery(config, accelerator, start=start)


@pytest.mark.parametrize(
    ("options", "operators"),
    [
        ({"memory_format": "channels_last", "mixed_precision": "bf16"}, 1230),
        ({"memory_format": "contiguous", "prediction_type": "v_prediction", "snr_gamma": 5.0}, 790),
    ],
)
def test_diffusion(tmp_path, gpu, options, operators):
    compare(gpu, tmp_path, DiffusionConfig, make_diffusion, operators, width=8, sample_size=GRID, **options)


SPACE = {"lambda_spatial": 0.1, "lambda_smooth": 0.1}
NESTED = {"num_parts": 4, "children": (1, 3), "parent": "given", "norm": "instance"}


@pytest.mark.parametrize(
    ("make_task", "options", "operators"),
    [
        (make_discovery, {"teacher_noise": "fresh", "dropout": 0.2}, 1670),
        (make_discovery, {"teacher_noise": "fixed", "dropout": 0.2, "mixed_precision": "bf16"}, 1080),
        (make_nested, {**NESTED, "lambda_denoised": 0.5, "relative_consistency": True, **SPACE}, 1520),
        (make_nested, {**NESTED, "mixed_precision": "bf16"}, 1190),
    ],
)
def test_consistency_losses(tmp_path, gpu, make_task, options, operators):
    compare(gpu, tmp_path, DiscoveryConfig, make_task, operators, teacher="given", **options)


@pytest.mark.parametrize(
    ("options", "operators"),
    [({"sibling_order": "free", **SPACE}, 1220), ({"sibling_order": "size", "mixed_precision": "bf16"}, 880)],
)
def test_assigned_parts(tmp_path, gpu, options, operators):
    fixed = {"objective": "assignment", "selection": "last", "reliable_share": 1.0, "teacher": "given"}
    compare(gpu, tmp_path, DiscoveryConfig, make_nested, operators, **fixed, **NESTED, **options)


def test_robust_scaling_is_not_captured(tmp_path, gpu, caplog):
    """It selects the foreground's voxels; reading their number from a GPU is not allowed in a capture."""
    options = {"teacher": "given", "num_parts": 3, "init_from": "given", "norm": "instance"}
    eager = run(DiscoveryConfig, tmp_path / "default", make_robust, **options)
    assert "cannot be captured" not in caplog.text
    wanted = run(DiscoveryConfig, tmp_path / "wanted", make_robust, cuda_graphs=True, **options)
    assert not gpu.graphs and "cannot be captured as a CUDA graph (CUDA error: operation not permitted" in caplog.text
    torch.testing.assert_close(wanted, eager)


def test_brains(tmp_path, gpu, make_nifti):
    eager, graphed = tmp_path / "eager", tmp_path / "graphed"
    train_brain(brain_config(eager, tmp_path / "scans", make_nifti, cuda_graphs=False))
    assert not gpu.graphs
    train_brain(brain_config(graphed, tmp_path / "scans", make_nifti))
    assert [graph.replays for graph in gpu.graphs] == [REPLAYED, REPLAYED]
    for phase in ("discovery", "diffusion"):
        torch.testing.assert_close(losses_in(graphed / phase), losses_in(eager / phase))
    ours, theirs = (load_discovery(str(folder)).state_dict() for folder in (graphed, eager))
    torch.testing.assert_close(ours, theirs)


TAUGHT = {"teacher": "given", "selection": "last"}


@pytest.mark.parametrize(
    ("kind", "make_task", "options"),
    [
        (DiffusionConfig, make_diffusion, {"width": 8, "sample_size": GRID}),
        (DiffusionConfig, make_diffusion, {"width": 8, "sample_size": GRID, "cuda_graphs": True}),
        (DiscoveryConfig, make_discovery, {**TAUGHT, "teacher_noise": "fresh", "dropout": 0.2}),
        (DiscoveryConfig, make_discovery, {**TAUGHT, "teacher_noise": "fixed", "dropout": 0.2}),
        (DiscoveryConfig, make_nested, {**TAUGHT, **NESTED, **SPACE}),
        (DiscoveryConfig, make_nested, {**TAUGHT, **NESTED, "objective": "assignment", "reliable_share": 1.0}),
    ],
)
def test_the_host_does_not_wait_in_a_step(tmp_path, gpu, kind, make_task, options):
    """Forward and backward pass, clipping, optimiser, averages and metrics."""
    waits = []
    for steps in (4, 5, 8):  # the first training fills caches; all volumes have been seen after three steps
        before = len(gpu.waits)
        shared = {"max_steps": steps, "memory_format": "channels_last", "log_every": 100, "cuda_graphs": False}
        run(kind, tmp_path / str(steps), make_task, **{**shared, **options})
        waits.append(len(gpu.waits) - before)
    assert waits[1] == waits[2] > 0


def test_a_step_that_depends_on_the_host_would_be_told_apart(tmp_path, gpu):
    class Changing(DiffusionTraining):
        """A training whose loss is multiplied by a number that Python changes."""

        steps = 0

        def losses(self, model, batch):
            self.steps += 1
            return {"loss": self.steps * super().losses(model, batch)["loss"]}

    with pytest.raises(AssertionError, match="not close"):
        compare(
            gpu, tmp_path, DiffusionConfig, lambda config, _: Changing(config, GRID), 760, width=8, sample_size=GRID,
            memory_format="contiguous",
        )  # fmt: skip
