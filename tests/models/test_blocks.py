"""Blocks that compute in an order of their own, against torch's plain way."""

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.models.blocks import LinearAttention, NormSiLU
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel

GRID = (5, 6, 4)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_norm_and_silu_are_torchs(dtype, layout):
    torch.manual_seed(0)
    norm = NormSiLU(4, 12)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 12, *GRID).to(dtype).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(2, 12, *GRID).to(dtype).contiguous(memory_format=layout)
    found = norm(x)
    exact_x = x.detach().double().requires_grad_()
    weight, bias = norm.weight.detach().double().requires_grad_(), norm.bias.detach().double().requires_grad_()
    exact = F.silu(F.group_norm(exact_x, 4, weight, bias, norm.eps))
    expected = gradients((exact * upstream.double()).sum(), exact_x, weight, bias)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(found.double(), exact, **tolerance)
    for a, b in zip(gradients((found * upstream).sum(), x, norm.weight, norm.bias), expected, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)
    assert found.is_contiguous(memory_format=layout)


def test_a_frozen_norm_gives_the_gradient_of_its_input_alone():
    norm = NormSiLU(2, 4).requires_grad_(False)
    x = torch.randn(1, 4, *GRID).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    norm(x).square().sum().backward()
    plain = x.detach().contiguous().requires_grad_()
    norm(plain).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-5)
    assert norm.weight.grad is None


@pytest.fixture
def attention():
    torch.manual_seed(1)
    module = LinearAttention(8, heads=2, head_dim=4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


@pytest.mark.parametrize("chunk", [7, 40, 119])  # the grid has 120 voxels
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_attention_in_chunks_is_attention(attention, chunk, layout):
    x = torch.randn(3, 8, *GRID, requires_grad=True)
    upstream = torch.randn(3, 8, *GRID)
    parameters = list(attention.parameters())
    whole = attention(x)
    expected = gradients((whole * upstream).sum(), x, *parameters)
    attention.chunk = chunk
    y = x.detach().contiguous(memory_format=layout).requires_grad_()
    found = attention(y)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients((found * upstream).sum(), y, *parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(attention(y), whole, rtol=1e-5, atol=1e-5)


def test_keys_far_from_zero_do_not_overflow(attention):
    with torch.no_grad():
        attention.qkv.weight.mul_(200)
    x = torch.randn(1, 8, *GRID)
    whole = attention(x)
    attention.chunk = 16
    assert torch.isfinite(attention(x)).all()
    torch.testing.assert_close(attention(x), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 24, 32), (8, 24, 16), (2, 8, 24)])
def test_gradients_of_short_volumes_are_right_in_bfloat16(shape):
    """The first axis becomes two voxels on some level: the bfloat16 weight gradient of torch is garbage there."""
    torch.manual_seed(0)
    networks = [
        UNet3DModel(width=16, channel_multipliers=(1, 2, 2, 2), attention=(None,) * 4, sample_size=None),
        StructureDiscoveryModel(3, dropout=0.0, norm="instance"),
    ]
    for network in networks:
        x = torch.rand(2, 1, *shape)
        upstream = None
        found = {}
        for enabled in (False, True):
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = network(x, torch.tensor([3, 7])).sample if isinstance(network, UNet3DModel) else network(x).logits
            upstream = torch.randn_like(out, dtype=torch.float32) if upstream is None else upstream
            (out.float() * upstream).sum().backward()
            found[enabled] = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
        for name, exact in found[False].items():
            if exact.ndim == 5:  # of the convolutions' weights
                assert (found[True][name] - exact).norm() <= 0.1 * exact.norm() + 1e-3, name
