"""The diffusion UNet: shapes, grids, early exit, saving, and its layers against direct formulas."""

import json

import pytest
import torch

from diffdiscover3d.errors import ModelError
from diffdiscover3d.models.attention import ChannelLayerNorm, FullAttention, LinearAttention
from diffdiscover3d.models.blocks import TimeEmbedding
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel

TINY = {"width": 8, "channel_multipliers": (1, 2, 4), "attention": (None, None, "linear"), "norm_groups": 4}


def tiny(**changes) -> UNet3DModel:
    torch.manual_seed(0)
    return UNet3DModel(**{**TINY, **changes}).eval()


@pytest.mark.parametrize(
    ("config", "grid", "stage_grids", "extent"),
    [
        # padded to the stride of 4
        ({}, (8, 12, 4), [(2, 3, 1), (4, 6, 2), (4, 6, 2)], (8, 12, 4)),
        ({}, (9, 5, 7), [(3, 2, 2), (6, 4, 4)], (12, 8, 8)),
        ({}, (1, 2, 3), [(1, 1, 1), (2, 2, 2)], (4, 4, 4)),
        # resized to the internal grid
        ({"sample_size": 8}, (9, 5, 7), [(2, 2, 2), (4, 4, 4)], (9, 5, 7)),
        ({"sample_size": (8, 4, 12)}, (20, 3, 7), [(2, 1, 3), (4, 2, 6)], (20, 3, 7)),
        ({"attention": ("linear", "full", None), "blocks_per_level": 1}, (8, 4, 4), [(2, 1, 1), (4, 2, 2)], (8, 4, 4)),
    ],
)
@torch.no_grad()
def test_shapes(config, grid, stage_grids, extent):
    model = tiny(**config)
    out = model(torch.randn(2, 1, *grid), torch.tensor([3, 200]), stages=(1, 2))
    assert out.sample.shape == (2, 1, *grid)
    assert [tuple(f.shape[2:]) for f in out.features] == stage_grids[:2]
    assert [f.shape[1] for f in out.features] == [model.stage_channels(1), model.stage_channels(2)] == [16, 8]
    assert out.extent == extent


@torch.no_grad()
def test_early_exit_gives_the_same_features_and_stops():
    model, x = tiny(), torch.randn(1, 1, 8, 12, 8)
    whole = model(x, 25, stages=(2, 1))
    used = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: used.append(name))
    early = model(x, 25, stages=(1,), return_sample=False)
    assert early.sample is None
    torch.testing.assert_close(early.features[0], whole.features[1], rtol=0, atol=0)
    assert not any(n.startswith(("up_levels.1", "upsamples", "final_block", "conv_out")) for n in used)
    assert any(n.startswith("up_levels.0") for n in used)


@torch.no_grad()
def test_padding_repeats_the_border():
    model = tiny()
    x = torch.randn(1, 1, 6, 8, 4)
    padded = torch.cat([x, x[:, :, -1:], x[:, :, -1:]], dim=2)
    torch.testing.assert_close(model(x, 7).sample, model(padded, 7).sample[:, :, :6])


def test_gradient_checkpointing_changes_no_gradient():
    x, t = torch.randn(2, 1, 8, 4, 4), torch.tensor([1, 9])
    gradients = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(x, t).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_saves_and_loads_in_any_float_type(tmp_path):
    model, x = tiny(sample_size=8), torch.randn(1, 1, 5, 6, 7)
    model.save_pretrained(tmp_path / "full")
    loaded = UNet3DModel.from_pretrained(tmp_path / "full")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    torch.testing.assert_close(loaded(x, 25).sample, model(x, 25).sample)
    torch.nn.Module.to(model, torch.float16).save_pretrained(tmp_path / "half")
    half = UNet3DModel.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half(x, 25).sample, loaded(x, 25).sample, rtol=0.05, atol=0.02)
    assert UNet3DModel.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_missing_weights_and_unknown_keys_are_errors(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not maps of the file written below
    complete = dict(state)
    del state["conv_in.weight"]
    save_file(state, weights)
    with pytest.raises(ModelError, match=r"conv_in\.weight"):
        UNet3DModel.from_pretrained(tmp_path)
    save_file({**complete, "extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(ModelError, match=r"extra\.weight"):
        UNet3DModel.from_pretrained(tmp_path)
    save_file(complete, weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ModelError, match="depth"):
        UNet3DModel.from_pretrained(tmp_path)


def test_paper_preset_is_the_paper_network():
    with torch.device("meta"):
        model = UNet3DModel(**UNET_PRESETS["paper"])
    assert [model.stage_channels(s) for s in (1, 2, 3)] == [256, 128, 64]
    assert model.stride == 8 and model.noise_grid is None
    assert model.conv_in.out_channels == 42  # 64 // 3 * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 7}, "width"),
        ({"width": 10}, "norm_groups"),
        ({"attention": (None,)}, "each of 3 resolutions"),
        ({"attention": (None, None, "quadratic")}, "quadratic"),
        ({"sample_size": 10}, "multiple of 4, got 10; try 12"),
        ({"sample_size": 0}, "multiple of 4, got 0; try 4"),
        ({"resize_before_noise": True}, "sample_size"),
    ],
)
def test_bad_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 8, 8, 8), {}, "batch, channel"),
        ((1, 1, 8, 8, 8), {"stages": (3,)}, r"1\.\.2"),
        ((1, 1, 8, 8, 8), {"return_sample": False}, "nothing is asked for"),
    ],
)
def test_bad_inputs_are_named(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape), 25, **arguments)


def test_time_embedding_formula():
    embedding = TimeEmbedding(8)
    t = torch.tensor([0.0, 25.0])
    frequencies = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])
    sinusoids = torch.cat([(t[:, None] * frequencies).sin(), (t[:, None] * frequencies).cos()], dim=1)
    expected = embedding.linear_2(torch.nn.functional.gelu(embedding.linear_1(sinusoids)))
    torch.testing.assert_close(embedding(t), expected)


def test_attentions_equal_their_sums_written_out():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 2, 3, 2)
    for kind in (LinearAttention, FullAttention):
        layer = kind(6, heads=2, head_dim=3)
        y = layer.norm(x).flatten(2)[0]  # (channels, voxels)
        q, k, v = (layer.qkv.weight.flatten(1) @ y).reshape(3, 2, 3, -1)
        heads = []
        for h in range(2):
            if kind is FullAttention:
                weights = (q[h].T @ k[h] * 3**-0.5).softmax(dim=1)
                heads.append(torch.stack([sum(weights[i, j] * v[h][:, j] for j in range(12)) for i in range(12)], 1))
            else:
                attention = k[h].softmax(dim=1) @ v[h].T
                heads.append(torch.stack([attention.T @ (q[h][:, i].softmax(0) * 3**-0.5) for i in range(12)], 1))
        mixed = torch.cat(heads).reshape(1, 6, 2, 3, 2)
        torch.testing.assert_close(layer(x), x + layer.norm_out(layer.out(mixed)))


def test_channel_layer_norm_formula():
    x, norm = torch.randn(2, 5, 3, 2, 4), ChannelLayerNorm(5)
    torch.nn.init.normal_(norm.weight)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    shape = (1, 5, 1, 1, 1)
    torch.testing.assert_close(norm(x), expected * norm.weight.view(shape) + norm.bias.view(shape))
