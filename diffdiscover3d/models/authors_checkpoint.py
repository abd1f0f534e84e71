"""Convert a checkpoint released by the paper's authors into a [`UNet3DModel`]."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel

_BLOCK = {
    "mlp.1": "time_projection",
    "block1.block.0": "conv1",
    "block1.block.1": "norm1",
    "block2.block.0": "conv2",
    "block2.block.1": "norm2",
    "res_conv": "shortcut",
}
_ATTENTION = {
    "fn.norm.g": "norm.weight",
    "fn.norm.b": "norm.bias",
    "fn.fn.to_qkv": "qkv",
    "fn.fn.to_out.1.g": "norm_out.weight",
    "fn.fn.to_out.1.b": "norm_out.bias",
    "fn.fn.to_out.0": "out",
    "fn.fn.to_out": "out",
}
_TOP = {
    "init_conv": "conv_in",
    "time_mlp.1": "time_embedding.linear_1",
    "time_mlp.3": "time_embedding.linear_2",
    "final_conv.1": "conv_out",
}


def load_authors_checkpoint(path: str | Path) -> UNet3DModel:
    """Load a `.pt` or `.safetensors` checkpoint of the authors' code as a [`UNet3DModel`].

    A `.pt` file is a pickle; it is loaded with `weights_only=True`, so no code in it is executed.

    Raises:
        InputError: if the file is missing or does not contain only tensors.
        ModelError: if its keys do not match the authors' UNet.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the authors' checkpoint (.pt or .safetensors).")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of plain tensors ({error}).") from error
    except Exception as error:  # safetensors raises its own exception class
        raise InputError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error}).") from error
    return convert_authors_state_dict(state)


def convert_authors_state_dict(state: Mapping) -> UNet3DModel:
    """Convert a state dict of the authors' code (`{"model": {...}}` or flat, any prefix before `unet.`) to a model.

    Width and channel multipliers are inferred from the weights; the internal grid has `width` voxels per axis, as in
    their code.

    Raises:
        ModelError: if keys are missing or unknown, or shapes do not match.
    """
    state = state.get("model", state)
    weights = {}
    for key, tensor in state.items():
        match = re.search(r"(?:^|\.)unet\.(.+)$", key)
        if match:  # all other keys are buffers of the noise schedule
            new_key = _convert_key(match.group(1))
            is_norm = new_key.rsplit(".", 2)[-2] in ("norm", "norm_out")
            weights[new_key] = tensor.flatten().float() if is_norm else tensor.float()
    if "conv_out.weight" not in weights:
        raise ModelError("not a checkpoint of the authors' UNet: it has no key `unet.final_conv.1.weight`.")

    width = weights["conv_out.weight"].shape[1]
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("down_levels."))
    channels = [weights[f"down_levels.{i}.blocks.0.conv2.weight"].shape[0] for i in range(depth)]
    model = UNet3DModel(
        **{
            **UNET_PRESETS["paper"],
            "in_channels": weights["conv_in.weight"].shape[1],
            "out_channels": weights["conv_out.weight"].shape[0],
            "width": width,
            "channel_multipliers": tuple(c // width for c in channels),
            "attention": ("linear",) * depth,
            "sample_size": width,
        }
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"the checkpoint does not match the authors' UNet: {str(error)[:300]}") from error
    return model.eval()


def _convert_key(key: str) -> str:
    """Map one key of the authors' UNet, without its prefix, to the key of [`UNet3DModel`]."""
    if key.startswith("final_conv.0."):
        return "final_block." + _replace_prefix(key.removeprefix("final_conv.0."), _BLOCK)
    if key.startswith(("mid_block1.", "mid_block2.")):
        block, rest = key.split(".", 1)
        return f"{block}." + _replace_prefix(rest, _BLOCK)
    if key.startswith("mid_attn."):
        return "mid_attention." + _replace_prefix(key.removeprefix("mid_attn."), _ATTENTION)
    match = re.match(r"(downs|ups)\.(\d+)\.(\d)\.(.+)$", key)
    if match:
        side, depth, block, rest = match.groups()
        side = side.removesuffix("s")
        if block in "01":
            return f"{side}_levels.{depth}.blocks.{block}." + _replace_prefix(rest, _BLOCK)
        if block == "2":
            return f"{side}_levels.{depth}.attention." + _replace_prefix(rest, _ATTENTION)
        return f"{side}samples.{depth}.{rest}"
    return _replace_prefix(key, _TOP)


def _replace_prefix(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    raise ModelError(f"not a checkpoint of the authors' UNet: unknown key {key!r}.")
