"""Group norm and SiLU in Triton, run by Triton's interpreter, against PyTorch in double precision."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.models import cpu_kernels, mixed_precision, triton_norm
from diffdiscover3d.models.unet_3d import UNet3DModel

GRID, LAST = (5, 3, 7), torch.channels_last_3d
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture
def interpreted(monkeypatch):
    """Several programs for each volume, and tiles that do not divide it."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(triton_norm, "_PROGRAMS", 12)
    monkeypatch.setattr(triton_norm, "_TILE", 64)
    monkeypatch.setattr(triton_norm, "_CHANNELS", 8)


def channels_last(*shape):
    return torch.randn(*shape).to(memory_format=LAST).requires_grad_()


@pytest.mark.parametrize(
    ("channels", "groups", "addend", "with_offset"),
    [(12, 4, None, True), (16, 2, (2, 0, 1, 1, 1), True), (10, 10, (2, 0, *GRID), True), (16, 4, (2, 0, *GRID), False)],
)
def test_values_and_gradients_are_those_of_pytorch(interpreted, channels, groups, addend, with_offset):
    torch.manual_seed(0)
    x = channels_last(2, channels, *GRID)
    weight, bias, offset = (torch.randn(channels, requires_grad=True) for _ in range(3))
    inputs = {"x": x, "weight": weight, "bias": bias}
    if addend:
        inputs["addend"] = torch.randn([n or channels for n in addend], requires_grad=True)
    if with_offset:
        inputs["offset"] = offset
    found = triton_norm.norm_silu(**inputs, groups=groups, eps=1e-5)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, list(inputs.values()), upstream)

    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    shifted = exact["x"] + (exact["offset"][:, None, None, None] if with_offset else 0)
    expected = F.silu(F.group_norm(shifted, groups, exact["weight"], exact["bias"], 1e-5)) + exact.get("addend", 0)
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=LAST)


def test_a_bfloat16_volume_is_rounded_once(interpreted):
    torch.manual_seed(0)
    x = (3 + channels_last(1, 16, *GRID)).bfloat16()
    weight, bias = torch.randn(2, 16)
    found = triton_norm.norm_silu(x, weight, bias, 4, 1e-5)
    expected = F.silu(F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-6)


def test_a_network_is_the_same_with_them(interpreted, monkeypatch):
    torch.manual_seed(0)
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=("linear", None), norm_groups=4)
    x, steps = torch.randn(2, 1, 8, 6, 4), torch.tensor([3, 200])

    def outputs():
        unet.zero_grad()
        sample = unet(x, steps).sample
        F.l1_loss(sample, x).backward()
        return torch.cat([sample.detach().flatten(), *(p.grad.flatten() for p in unet.parameters())])

    expected, used = outputs(), []
    unet.to(memory_format=LAST)
    monkeypatch.setattr(
        triton_norm, "is_supported", lambda x: used.append(x.is_contiguous(memory_format=LAST)) or used[-1]
    )
    monkeypatch.setattr(cpu_kernels, "is_on_cpu", lambda x: False)
    monkeypatch.setattr(mixed_precision, "free_memory", lambda device: float("inf"))
    found = outputs()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert sum(used) > 20


def test_they_are_used_on_a_gpu_only():
    assert not triton_norm.is_supported(channels_last(1, 8, 4, 4, 4).bfloat16())


def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, by the compiler that comes with Triton; no GPU is needed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.helpers.compile_kernels", "80", "90"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(done.stdout)
    for sizes in (found["80"], found["90"]):
        assert len(sizes) == 12 and len({name for name, _ in sizes}) == 6 and all(size > 1000 for _, size in sizes)
