"""Custom blocks against the reference operations of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from diffdiscover3d.models.attention import LinearAttention
from diffdiscover3d.models.blocks import NormSiLU
from diffdiscover3d.models.cpu_kernels import Conv3d, GroupNorm
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


def test_an_adopted_group_norm_is_torchs_and_its_gradient_is_computed_on_copies():
    torch.manual_seed(0)
    network = GroupNorm.adopt(nn.Sequential(nn.GroupNorm(3, 6), nn.ReLU()))
    assert type(network[0]) is GroupNorm and list(network.state_dict()) == ["0.weight", "0.bias"]
    plain = nn.GroupNorm(3, 6).double()
    with torch.no_grad():
        for a, b in zip(plain.parameters(), network[0].parameters(), strict=True):
            a.copy_(b.normal_())
    x = torch.randn(2, 6, *GRID).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    upstream = torch.randn(2, 6, *GRID)
    exact_x = x.detach().double().requires_grad_()
    expected = plain(exact_x)
    found, layouts = network[0](x), []
    norm = found.grad_fn.next_functions[0][0]  # behind the copy to channels-last
    assert norm.name() == "NativeGroupNormBackward0"
    norm.register_prehook(lambda g: layouts.append(g[0].is_contiguous()))
    of_x, *of_weights = gradients((found * upstream).sum(), x, *network[0].parameters())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = gradients((expected * upstream.double()).sum(), exact_x, *plain.parameters())
    for a, b in zip((of_x, *of_weights), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert layouts == [True]
    with torch.no_grad():  # nothing is copied without gradients
        assert torch.equal(network[0](x), nn.functional.group_norm(x, 3, *network[0].parameters()))


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
    """The first axis shrinks to two voxels, where torch's bfloat16 weight gradient is wrong."""
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


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (7, 1, 3), (1, 1, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@torch.no_grad()
def test_a_single_small_volume_is_convolved_as_in_double_precision(kernel, stride, padding, layout):
    torch.manual_seed(0)
    convolution = Conv3d(5, 6, kernel, stride=stride, padding=padding).to(memory_format=layout)
    volume = torch.randn(1, 5, 9, 12, 7).contiguous(memory_format=layout)
    w, b = convolution.weight.double(), convolution.bias.double()
    expected = F.conv3d(volume.double(), w, b, stride=stride, padding=padding)
    torch.testing.assert_close(convolution(volume), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_single_small_volume_has_the_gradients_of_torchs_convolution():
    torch.manual_seed(0)
    convolution, volume = Conv3d(2, 3, 3, padding=1), torch.randn(1, 2, 5, 6, 7)
    plain = nn.Conv3d(2, 3, 3, padding=1)
    plain.load_state_dict(convolution.state_dict())
    for module in (convolution, plain):
        module(volume).square().sum().backward()
    torch.testing.assert_close(convolution.weight.grad, plain.weight.grad)


def test_small_volumes_do_not_fall_into_torchs_slow_loop():
    """Guards the purpose of Conv3d: fails if torch fixes the slow path or the workaround is lost."""
    volume = torch.randn(1, 32, 12, 12, 12)
    used = {}
    for kind in (Conv3d, nn.Conv3d):
        with torch.no_grad(), torch.profiler.profile() as profile:
            kind(32, 32, 3, padding=1)(volume)
        used[kind] = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in used[Conv3d] and "aten::slow_conv3d_forward" not in used[Conv3d]
    assert "aten::slow_conv3d_forward" in used[nn.Conv3d]


@torch.no_grad()
def test_whoever_traces_or_switches_onednn_off_gets_torchs_convolution(monkeypatch):
    convolution, volume = Conv3d(2, 3, 3, padding=1), torch.randn(1, 2, 5, 6, 7)
    plain = convolution(volume)

    def refuse(*_):
        raise AssertionError("asked oneDNN itself")

    monkeypatch.setattr(torch, "mkldnn_convolution", refuse)
    with pytest.raises(AssertionError, match="asked oneDNN"):
        convolution(volume)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(convolution(volume), plain)
    torch.testing.assert_close(torch.jit.trace(convolution, volume, check_trace=False)(volume), plain)
    torch.testing.assert_close(convolution(volume[0]), plain[0])  # unbatched
    with FakeTensorMode() as mode:
        assert Conv3d(2, 3, 3, padding=1)(mode.from_tensor(volume)).shape == plain.shape
    with pytest.raises(RuntimeError, match=r"Expected 4D .* or 5D"):
        convolution(volume[None])


def test_somebody_elses_network_is_adopted_under_the_same_names():
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Sequential(nn.ConvTranspose3d(2, 1, 3), nn.Conv3d(1, 1, 1)))
    names = list(network.state_dict())
    assert Conv3d.adopt(network) is network
    assert list(network.state_dict()) == names
    assert [type(m) for m in network.modules() if isinstance(m, nn.Conv3d)] == [Conv3d, Conv3d]
    assert type(network[1][0]) is nn.ConvTranspose3d
    assert Conv3d.release(network) is network and list(network.state_dict()) == names
    assert not any(isinstance(m, Conv3d) for m in network.modules())
