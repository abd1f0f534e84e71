"""What the diffusion UNet computes on an accelerator, run on a CPU and compared with double precision."""

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.models import attention, cpu_kernels, mixed_precision, structure_discovery
from diffdiscover3d.models.accelerator_convolutions import convolve, convolve_unfolded
from diffdiscover3d.models.attention import FullAttention, LinearAttention
from diffdiscover3d.models.fused_kernels import NATIVE, compiled_kernels
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.models.window_layout import activation_bytes

GRID = (6, 8, 4)


@pytest.fixture
def accelerator(monkeypatch):
    """Take the code for accelerators, with memory for everything, and segments as on a fine grid."""
    monkeypatch.setattr(cpu_kernels, "is_on_cpu", lambda x: False)
    monkeypatch.setattr(mixed_precision, "free_memory", lambda device: float("inf"))
    monkeypatch.setattr(attention, "_MIN_SEGMENT", 16)


def make(cls):
    torch.manual_seed(1)
    module = cls(8, heads=2, head_dim=4).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def with_gradients(function, x, parameters, upstream):
    found = function(x)
    return [found, *torch.autograd.grad((found * upstream).sum(), [x, *parameters])]


@pytest.mark.parametrize("cls", [LinearAttention, FullAttention])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_attention_on_tokens_is_attention_in_double_precision(cls, layout, monkeypatch):
    module = make(cls)
    x = torch.randn(3, 8, *GRID).double().contiguous(memory_format=layout).requires_grad_()
    upstream, parameters = torch.randn(3, 8, *GRID).double(), list(module.parameters())
    expected = with_gradients(module, x, parameters, upstream)  # channels-first, as on a CPU
    monkeypatch.setattr(attention, "_MIN_SEGMENT", 16)
    assert attention._segments(6 * 8 * 4) == 8
    for a, b in zip(with_gradients(module.forward_tokens, x, parameters, upstream), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if cls is LinearAttention:  # which computes in float32 within
        module.chunk = 50
        for a, b in zip(with_gradients(module.forward_chunks, x, parameters, upstream), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_segments_are_equal_powers_of_two():
    expected = {512: 1, 4096: 1, 8192: 2, 12288: 2, 50**3: 8, 64**3: 64, 128**3: 64, 12289: 1}
    assert {n: attention._segments(n) for n in expected} == expected


@pytest.mark.parametrize("addend", [None, (2, 8, 1, 1, 1), (2, 8, 3, 4, 5)])
def test_norm_silu_with_an_addend_has_the_gradients_of_its_formula(accelerator, addend):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).double().requires_grad_() for s in ((2, 8, 3, 4, 5), (8,), (8,)))
    extra = None if addend is None else torch.randn(addend).double().requires_grad_()
    inputs = [t for t in (x, weight, bias, extra) if t is not None]
    found = NATIVE.norm_silu(x, weight, bias, 4, 1e-5, extra)
    grouped = x.reshape(2, 4, -1)
    normed = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    normed = normed.reshape(x.shape) * weight[:, None, None, None] + bias[:, None, None, None]
    expected = normed * normed.sigmoid() + (0 if extra is None else extra)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(found)
    expected = torch.autograd.grad((expected * upstream).sum(), inputs)
    for a, b in zip(torch.autograd.grad((found * upstream).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "width", "kernel"), [(1, 10, 7), (3, 16, 5), (2, 6, 3)])
def test_padded_channels_change_neither_outputs_nor_gradients(channels, width, kernel):
    torch.manual_seed(0)
    first = torch.nn.Conv3d(channels, width, kernel, padding=kernel // 2).double()
    second = torch.nn.Conv3d(width, 5, 3, padding=1).double()
    x = torch.randn(2, channels, 5, 6, 4).double().requires_grad_()
    parameters = [*first.parameters(), *second.parameters()]
    upstream = torch.randn(2, 5, 5, 6, 4).double()

    def padded(x):
        entered = convolve_unfolded(first, x)
        assert entered.shape[1] % 8 == 0 and not entered[:, width:].any()
        return convolve(second, entered)

    expected = with_gradients(lambda x: second(first(x)), x, parameters, upstream)
    for a, b in zip(with_gradients(padded, x, parameters, upstream), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert convolve(torch.nn.Identity(), x) is x


def make_unet():
    torch.manual_seed(0)
    options = {"width": 8, "channel_multipliers": (1, 2, 4), "attention": ("linear", "linear", None), "norm_groups": 4}
    return UNet3DModel(**options, attention_heads=2, attention_head_dim=4)


def loss_and_gradients(unet, dtype=torch.float32, bf16=False):
    generator = torch.Generator().manual_seed(1)
    # three voxels along the first axis of the coarsest grid: oneDNN's bfloat16 is wrong for two
    x = torch.randn(2, 1, 12, 16, 8, generator=generator).to(dtype)
    torch.nn.Module.to(unet, dtype)
    unet.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = unet(x, torch.tensor([3, 200]), stages=(1, 2))
    loss = F.l1_loss(out.sample.to(dtype), x) + sum(f.to(dtype).square().mean() for f in out.features)
    loss.backward()
    assert all(p.grad.dtype == dtype for p in unet.parameters())
    return loss.detach(), torch.cat([p.grad.flatten() for p in unet.parameters()]).clone()


def test_the_whole_network_is_the_same_in_double_precision(monkeypatch, request):
    expected = loss_and_gradients(make_unet(), torch.float64)
    request.getfixturevalue("accelerator")
    found = loss_and_gradients(make_unet(), torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_weights_cast_at_once_give_gradients_near_double_precision(monkeypatch, request):
    exact = loss_and_gradients(make_unet(), torch.float64)[1]
    autocast = loss_and_gradients(make_unet(), bf16=True)[1]
    request.getfixturevalue("accelerator")
    unet = make_unet()
    before = list(unet.parameters())
    calls = []
    cast = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a, **k: calls.append(len(a[0])) or cast(*a, **k))
    found = loss_and_gradients(unet, bf16=True)[1]
    assert all(a is b for a, b in zip(unet.parameters(), before, strict=True))
    assert calls == [len(before)] * 2  # one cast of all weights, one of all gradients
    error, usual = ((g.double() - exact).norm() / exact.norm() for g in (found, autocast))
    assert error < max(2 * usual, 0.03)


def test_weights_are_restored_after_an_error(accelerator):
    unet = make_unet()
    before = list(unet.parameters())
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        unet(torch.randn(1, 3, 8, 8, 8), 5)  # a channel too many
    assert all(a is b for a, b in zip(unet.parameters(), before, strict=True))


def test_recomputation_gives_the_same_gradients_under_autocast(accelerator):
    expected = loss_and_gradients(make_unet(), bf16=True)[1]
    unet = make_unet().train()
    unet.enable_gradient_checkpointing()
    found = loss_and_gradients(unet, bf16=True)[1]
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_attention_falls_back_to_chunks_where_memory_is_short(monkeypatch):
    module = make(LinearAttention).float()
    x = torch.randn(2, 8, *GRID)
    expected = module(x)
    used = []
    monkeypatch.setattr(cpu_kernels, "is_on_cpu", lambda x: False)
    for name in ("forward_tokens", "forward_chunks"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, name=name, original=original: used.append(name) or original(x))
    # two volumes of 192 voxels, 6 * 8 + 5 * 8 channels of 4 bytes, twice: a quarter of the free memory
    for free in (4 * 2 * 2 * 192 * 88 * 4, 4 * 2 * 2 * 192 * 88 * 4 - 1):
        module._fits.clear()
        monkeypatch.setattr(mixed_precision, "free_memory", lambda device, free=free: free)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert used == ["forward_tokens", "forward_chunks"]


@pytest.mark.slow
def test_fused_kernels_are_the_native_ones(accelerator):
    torch.manual_seed(0)
    fused = compiled_kernels()
    for channels, grid in ((8, GRID), (16, (4, 6, 5))):  # the second shape must not need another compilation
        x = torch.randn(2, channels, *grid, requires_grad=True)
        weight, bias = torch.randn(channels, requires_grad=True), torch.randn(channels, requires_grad=True)
        tokens = torch.randn(2, x[0, 0].numel(), channels, requires_grad=True)
        cases = {
            "norm_silu": ((x, weight, bias, 4, 1e-5, x.detach() * 2), (x, weight, bias)),
            "to_tokens": ((x, weight, bias), (x, weight, bias)),
            "query_weights": ((tokens.unflatten(-1, (2, -1)),), (tokens,)),
            "add_tokens": ((x, tokens, weight, bias), (x, tokens, weight, bias)),
        }
        for name, (arguments, inputs) in cases.items():
            outputs = [getattr(kernels, name)(*arguments) for kernels in (fused, NATIVE)]
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
            upstream = torch.randn_like(outputs[1])
            gradients = [torch.autograd.grad(out, inputs, upstream) for out in outputs]
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_windows_computed_together_give_the_same_parts(monkeypatch):
    torch.manual_seed(0)
    model = StructureDiscoveryModel(3, window_size=16, norm="instance")
    volume = torch.rand(24, 20, 28)
    expected = model.segment(volume).probabilities
    shapes = []
    model.network.register_forward_hook(lambda module, inputs, output: shapes.append(len(inputs[0])))
    monkeypatch.setattr(cpu_kernels, "is_on_cpu", lambda x: False)
    for free, together in ((float("inf"), 8), (2 * 3.5 * activation_bytes((24, 20, 28), 16, model.config), 3), (0, 1)):
        monkeypatch.setattr(structure_discovery, "free_memory", lambda device, free=free: free)
        shapes.clear()
        torch.testing.assert_close(model.segment(volume).probabilities, expected, rtol=1e-4, atol=1e-5)
        assert max(shapes) == together


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("segments", [1, 4])
def test_contexts_in_bfloat16_are_near_double_precision(mean, segments):
    """Values far from zero must not spoil the gradient of the keys, which does not depend on their mean."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 4096, 32, generator=generator).bfloat16()
    v = (v.float() + mean).bfloat16()
    same_head = torch.block_diag(*[torch.ones(8, 8)] * 4).bool()
    upstream = torch.randn(2, 32, 32, generator=generator).bfloat16()

    def compute(function, k, v):
        k, v = k.requires_grad_(), v.requires_grad_()
        out = function(k, v)
        return out, *torch.autograd.grad(out, (k, v), upstream.to(out.dtype))

    found = compute(lambda k, v: attention._Context.apply(k, v, same_head, 0.35, segments), k.clone(), v.clone())
    expected = compute(lambda k, v: (k.softmax(1).transpose(1, 2) @ v) * same_head * 0.35, k.double(), v.double())
    limits = (0.03 if mean == 0 else 0.005, 0.01, 0.01)  # without a mean the context itself is small
    for a, b, limit in zip(found, expected, limits, strict=True):
        assert (a.double() - b).norm() < limit * b.norm()
