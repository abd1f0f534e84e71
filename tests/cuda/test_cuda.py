"""What only a CUDA GPU can show: DIFFDISCOVER3D_TEST_CUDA=1 pytest tests/cuda. Skipped without one."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.models import triton_norm
from diffdiscover3d.models.attention import LinearAttention
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.training import backward, loop
from diffdiscover3d.training.backward import EagerPass, GraphedPass
from diffdiscover3d.training.brain_run import train_brain
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.data_order import draw_noise
from diffdiscover3d.training.dropout import hashed_masks, slot_keys
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.loop import train
from diffdiscover3d.training.step_metrics import StepMetrics
from tests.helpers.tiny_trainings import (
    GRID,
    TINY,
    Volumes,
    brain_config,
    losses_in,
    make_diffusion,
    make_discovery,
    make_nested,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def gradients(unet, device, dtype, bf16=False, memory_format=torch.contiguous_format):
    unet = torch.nn.Module.to(unet, device=device, dtype=dtype, memory_format=memory_format)
    unet.zero_grad()
    x = torch.randn(2, 1, *GRID, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        sample = unet(x, torch.tensor([3, 200], device=device)).sample
    F.l1_loss(sample.to(dtype), x).backward()
    return torch.cat([p.grad.flatten().cpu().double() for p in unet.parameters()])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("dtype", "bf16", "limit"), [(torch.float64, False, 1e-7), (torch.float32, True, 0.05)])
def test_gradients_are_those_of_a_cpu_in_double_precision(dtype, bf16, limit, memory_format):
    # the sinusoids of the timestep are float32 on both
    torch.manual_seed(0)
    unet = UNet3DModel(**TINY)
    expected = gradients(unet, "cpu", torch.float64)
    found = gradients(unet, "cuda", dtype, bf16, memory_format)
    assert (found - expected).norm() < limit * expected.norm()


@pytest.mark.skipif(triton_norm.triton is None, reason="needs Triton")
@pytest.mark.parametrize("shape", [(3, 40, 20, 12, 36), (1, 512, 4, 6, 5)])
def test_the_triton_norm_is_pytorchs_in_double_precision(shape):
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    x, addend, upstream = (torch.randn(shape, **like).to(memory_format=torch.channels_last_3d) for _ in range(3))
    weight, bias, offset = torch.randn(3, shape[1], device="cuda")
    inputs = [t.requires_grad_() for t in (x, weight, bias, addend, offset)]
    found = triton_norm.norm_silu(x, weight, bias, 8, 1e-5, addend, offset)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    normed = F.group_norm(exact[0] + exact[4][:, None, None, None], 8, exact[1], exact[2], 1e-5)
    expected = F.silu(normed) + exact[3]
    ours, theirs = torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, exact, upstream.double())
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        limit = 0.01 if a.dtype == torch.bfloat16 else 1e-5
        assert (a.double() - b).norm() < limit * b.norm()


def test_metrics_of_a_step_do_not_wait_for_the_next(tmp_path):
    metrics = StepMetrics(torch.device("cuda"), tmp_path)
    first, second = torch.tensor([[0.5, 1.0, 0.0], [0.25, 1.0, 0.0]], device="cuda")
    for step in range(1, 4):  # pinned memory is allocated, which waits for the device
        metrics.add(step, ("loss",), second)
    metrics.catch_up(everything=True)
    metrics.add(4, ("loss",), first)
    torch.cuda._sleep(2_000_000_000)  # about a second
    metrics.add(5, ("loss",), second)
    metrics.catch_up()
    assert metrics.latest == {"loss": 0.5}
    assert not torch.cuda.current_stream().query()
    metrics.catch_up(everything=True)
    assert metrics.latest == {"loss": 0.25}


@pytest.mark.parametrize("bf16", [False, True])
def test_graphed_features_are_the_eager_ones(bf16):
    torch.manual_seed(0)
    eager = DiffusionFeaturePipeline(UNet3DModel(**TINY), make_scheduler(250)).to("cuda")
    if bf16:
        eager.unet.to(memory_format=torch.channels_last_3d)
    graphed = DiffusionFeaturePipeline(eager.unet, eager.scheduler)
    graphed.enable_cuda_graphs()
    graphed._graphs._limit = 2
    kinds = ({"stages": (1, 2)}, {"stages": (2,), "denoised": True}, {"stages": (1,)})
    limit = 0.02 if bf16 else 1e-5

    def compare(seed, options):
        volume = torch.rand(GRID, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            found, expected = (
                p(volume, generator=torch.Generator().manual_seed(seed), **options) for p in (graphed, eager)
            )
        for a, b in zip(found.features, expected.features, strict=True):
            assert (a - b).norm() < limit * b.norm()
        return found.features[0]

    for seed in range(4):  # eager, captured, replayed
        for options in kinds[:2]:
            compare(seed, options)
    assert len(graphed._graphs._graphs) == 2
    for seed in range(3):  # the first graph is dropped, its memory given back
        compare(seed, kinds[2])
        torch.cuda.empty_cache()
    before = compare(7, kinds[1])
    with torch.no_grad():
        for parameter in eager.unet.parameters():
            parameter.mul_(1.1)
    after = compare(7, kinds[1])  # replayed with the weights of now
    assert (after - before).norm() > 0.02 * before.norm()
    assert not graphed._graphs._failed and len(graphed._graphs._graphs) == 2


def test_attention_is_whole_where_memory_allows():
    module, x = LinearAttention(8, 2, 4).cuda(), torch.randn(1, 8, *GRID, device="cuda")
    assert module._fits_whole(x, x[0, 0].numel())


def weights_of(task):
    return torch.cat([p.detach().flatten().float().cpu() for p in task.model.parameters()])


def train_losses(folder, make_task, config):
    """The losses of the steps, and what the training changed in the weights."""
    accelerator = make_accelerator(config)
    task = make_task(config, accelerator)
    before = weights_of(task)
    train(task, config, Volumes(), accelerator)
    lines = (folder / "log.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines]), weights_of(task) - before


def run(kind, folder, make_task, **options):
    fixed = {"preset": "small", "max_steps": 8, "log_every": 1, "preview_every": 0, "mixed_precision": "bf16"}
    fixed |= {"batch_size": 2, "output_dir": str(folder)}
    return train_losses(folder, make_task, make_config(kind, **{**fixed, **options}))


@pytest.fixture
def passes(monkeypatch):
    """The passes that trainings make."""
    made = []

    def make_pass(*arguments):
        made.append(backward.make_pass(*arguments))
        return made[-1]

    def replay(self, leaves, original=GraphedPass._replay):
        self.replays = getattr(self, "replays", 0) + 1
        return original(self, leaves)

    monkeypatch.setattr(loop, "make_pass", make_pass)
    monkeypatch.setattr(GraphedPass, "_replay", replay)
    return made


def assert_equal_but_replayed(plain, graphed, passes, tolerance):
    """The trainings had the same losses and changed the weights in the same way, one by replays."""
    for losses, change in (plain, graphed):
        assert len(losses) == 8 and change.norm() > 0
    torch.testing.assert_close(graphed[0], plain[0], rtol=tolerance, atol=1e-3)
    assert (graphed[1] - plain[1]).norm() < 0.3 * plain[1].norm()
    first, second = passes
    assert type(first) is EagerPass and isinstance(second, GraphedPass)
    assert second.replays == 5 and not second._failed


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_graphed_diffusion_training_is_the_eager_one(tmp_path, passes, memory_format):
    options = {"width": 8, "sample_size": (16, 24, 8), "memory_format": memory_format}
    plain = run(DiffusionConfig, tmp_path / "eager", make_diffusion, cuda_graphs=False, **options)
    graphed = run(DiffusionConfig, tmp_path / "graphed", make_diffusion, **options)
    assert_equal_but_replayed(plain, graphed, passes, 2e-2)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_a_graphed_discovery_training_is_the_eager_one(tmp_path, passes, noise, memory_format):
    options = {"teacher_noise": noise, "teacher": "none", "dropout": 0.2, "memory_format": memory_format}
    plain = run(DiscoveryConfig, tmp_path / "eager", make_discovery, cuda_graphs=False, **options)
    graphed = run(DiscoveryConfig, tmp_path / "graphed", make_discovery, **options)
    assert_equal_but_replayed(plain, graphed, passes, 5e-2)


@pytest.mark.parametrize("order", ["size", "free"])
def test_a_graphed_training_on_assigned_parts_is_the_eager_one(tmp_path, passes, order):
    options = {"objective": "assignment", "num_parts": 4, "children": (1, 3), "parent": "given", "norm": "instance"}
    options |= {"teacher": "none", "selection": "last", "reliable_share": 1.0, "sibling_order": order}
    plain = run(DiscoveryConfig, tmp_path / "eager", make_nested, cuda_graphs=False, **options)
    graphed = run(DiscoveryConfig, tmp_path / "graphed", make_nested, **options)
    assert_equal_but_replayed(plain, graphed, passes, 5e-2)


def test_a_graphed_brain_training_is_the_eager_one(tmp_path, passes, make_nifti):
    scans, eager, graphed = (tmp_path / name for name in ("scans", "eager", "graphed"))
    train_brain(brain_config(eager, scans, make_nifti, cuda_graphs=False))
    assert all(type(made) is EagerPass for made in passes)
    train_brain(brain_config(graphed, scans, make_nifti))
    assert [made.replays for made in passes if isinstance(made, GraphedPass)] == [3, 3]
    for phase in ("discovery", "diffusion"):
        torch.testing.assert_close(losses_in(graphed / phase), losses_in(eager / phase), rtol=2e-2, atol=1e-3)


def test_noise_and_masks_depend_on_slots_alone():
    seeds = [7, 2**61, 3]
    noise = draw_noise(seeds, (1, 5, 6, 4), torch.device("cuda"))
    torch.testing.assert_close(draw_noise(seeds[1:2], (1, 5, 6, 4), torch.device("cuda"))[0], noise[1], rtol=0, atol=0)
    assert abs(float(draw_noise([1], (64, 64, 64), torch.device("cuda")).std()) - 1) < 0.01
    on_gpu = hashed_masks(slot_keys(0, 5, [2, 3]).cuda(), 2, 999, 0.3)
    assert torch.equal(on_gpu.cpu(), hashed_masks(slot_keys(0, 5, [2, 3]), 2, 999, 0.3))


def test_labels_are_those_of_a_cpu():
    torch.manual_seed(0)
    model = StructureDiscoveryModel(3)
    with torch.no_grad():
        for _ in range(10):
            model.train()(torch.rand(2, 1, 16, 24, 16))
    volume = Volumes()[0]["volume"][None]
    expected = model.segment(volume).labels
    assert (model.cuda().segment(volume).labels.cpu() == expected).float().mean() > 0.999


def test_windows_of_a_large_scan_are_those_of_a_cpu(tmp_path):
    torch.manual_seed(0)
    network = StructureDiscoveryModel(3, window_size=16, norm="instance").eval()
    network.save_pretrained(tmp_path / "model")
    values = np.random.default_rng(0).normal(size=(40, 34, 28)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii.gz")
    found = {}
    for device in ("cpu", "cuda"):
        options = {"model": str(tmp_path / "model"), "probabilities": True, "device": device}
        segment(tmp_path / "scan.nii.gz", tmp_path / device, **options)
        (path,) = (tmp_path / device).glob("*probseg*")
        found[device] = np.asarray(nib.load(path).dataobj)
    np.testing.assert_allclose(found["cuda"], found["cpu"], atol=1e-3)
