"""Hostile configurations and damaged weights are refused with one error, before anything is built from them."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub import embedded_models
from diffdiscover3d.models.config_schema import read_config
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline

NESTED = 400  # as deep as JSON is still parsed
DISCOVERY = {
    "num_parts": [None, 0, 1, -3, 2.5, "4", True, [2], 10**9, float("nan")],
    "channels": [None, [], [8], "8,16", [8, -16], [8, 0, 16], [8.5, 16], [10**6] * 7, [4096] * 12, {"0": 8}, [[8, 16]]],
    "strides": [None, [], [0] * 6, [1, 2, 1, 2, 1], [1, 2, 1, 2, 1, -2], "1", [True] * 6, [2] * 11],
    "dropout": [None, -0.1, 1.0, 7, "0.2", float("inf")],
    "norm": [None, "group", 3, ["batch"], {}],
    "window_size": [None, 0, 1, -256, 2.5, "256", 10**9],
    "parent": [[], "parent", 3, {"num_parts": 0}, {"channels": None}],
    "children": [[0, 2], [1], "12", [1.5, 1.5], [-1, 5], 4, [1, 1]],
    "scaling": [None, "z_score", 1, ["robust"]],
    "bright_part": [-1, 2.5, "2", True, 99],
    "frame": [[96, 96], [96, 0, 96], "96", [96, 96, 96.5], [96, 112, 10**6], [96, 112, 96]],
}
UNET = {
    "width": [0, 3, -64, 10**6, None, "64", 64.5],
    "channel_multipliers": [[], [1], [0, 1], None, "12", [1, 10**6]],
    "blocks_per_level": [0, -1, 10**6, None, 1.5],
    "attention": [["none"] * 4, [None], "full", None, [1, 1, 1, 1]],
    "norm_groups": [0, 7, -8, None],
    "sample_size": [0, 47, [48, 48], [48, 48, 0], "48", 10**9],
    "resize_before_noise": [1, "yes", None],
    "in_channels": [0, 10**6, None],
}
SCHEDULER = {
    "num_train_timesteps": [0, -1, 3 * 10**7, None, "250", 2.5],
    "beta_schedule": ["cosine", None, 3],
    "prediction_type": ["noise", None],
    "trained_betas": ["0.1", [2.0], 3],
}


def cases(table: dict) -> list[tuple[str, object]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Copies of an embedded diffusion pipeline and discovery model, whose configurations may be edited."""
    model, folder = embedded_models()["synthetic-regular"], tmp_path_factory.mktemp("embedded")
    shutil.copytree(model.diffusion, folder / "diffusion")
    shutil.copytree(model.discovery, folder / "discovery")
    for path in folder.rglob("checksums.json"):
        path.unlink()
    return folder


def with_entry(path, name: str, value):
    """Set an entry of a JSON file and return the original text."""
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), name: value}))
    return text


@pytest.mark.parametrize(("name", "value"), cases(DISCOVERY))
def test_hostile_discovery_config(embedded, name, value):
    path = embedded / "discovery" / "config.json"
    before = with_entry(path, name, value)
    try:
        with pytest.raises(ModelError):
            StructureDiscoveryModel.from_pretrained(path.parent)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(("name", "value"), cases(UNET))
def test_hostile_unet_config(embedded, name, value):
    path = embedded / "diffusion" / "unet" / "config.json"
    before = with_entry(path, name, value)
    try:
        with pytest.raises(ModelError):
            UNet3DModel.from_pretrained(path.parent)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(("name", "value"), cases(SCHEDULER))
def test_hostile_scheduler_config(embedded, name, value):
    path = embedded / "diffusion" / "scheduler" / "scheduler_config.json"
    before = with_entry(path, name, value)
    try:
        with pytest.raises(ModelError):
            DiffusionFeaturePipeline.from_pretrained(embedded / "diffusion")
    finally:
        path.write_text(before)


def nested_parents(depth: int) -> str:
    return '{"_class_name": "StructureDiscoveryModel", "parent": ' * depth + "null" + "}" * depth


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", "\x00" * 40, nested_parents(NESTED), nested_parents(10_000), "[" * 100_000, " " * 2**21],
)
def test_files_that_hold_no_configuration(embedded, text):
    path = embedded / "discovery" / "config.json"
    before = path.read_text()
    path.write_text(text)
    try:
        with pytest.raises(ModelError):
            StructureDiscoveryModel.from_pretrained(path.parent)
    finally:
        path.write_text(before)


def test_embedded_configurations_are_valid():
    for model in embedded_models().values():
        assert read_config(model.discovery / "config.json")["num_parts"] >= 2
        assert read_config(model.diffusion / "unet" / "config.json")["width"] >= 4
        assert read_config(model.diffusion / "scheduler" / "scheduler_config.json")["num_train_timesteps"] == 250


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_absurd_weights(tmp_path, tiny_discovery, bad):
    folder = shutil.copytree(tiny_discovery, tmp_path / "model")
    (folder / "checksums.json").unlink()
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(n for n, w in weights.items() if n.endswith("weight"))
    weights[name].view(-1)[0] = bad
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="finite and at most 1e"):
        StructureDiscoveryModel.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_no_floating_point_numbers(tmp_path, tiny_discovery, dtype):
    folder = shutil.copytree(tiny_discovery, tmp_path / "model")
    (folder / "checksums.json").unlink()
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(n for n, w in weights.items() if n.endswith("weight"))
    weights[name] = weights[name].to(dtype)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is stored as"):
        StructureDiscoveryModel.from_pretrained(folder)


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [-1, 0, 1], [0, 1, 10**12]])
def test_an_order_of_parts_that_is_no_permutation(tmp_path, tiny_discovery, order):
    folder = shutil.copytree(tiny_discovery, tmp_path / "model")
    (folder / "checksums.json").unlink()
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "part_order": torch.tensor(order)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="permutation"):
        StructureDiscoveryModel.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["discovery", "unet"])
def test_thirty_flipped_bits_are_found(tmp_path, kind):
    model = embedded_models()["synthetic-regular"]
    source = model.discovery if kind == "discovery" else model.diffusion / "unet"
    folder = shutil.copytree(source, tmp_path / "model")
    load = (StructureDiscoveryModel if kind == "discovery" else UNet3DModel).from_pretrained
    load(folder)
    draw = random.Random(0)
    for number in range(30):
        path = folder / ("config.json" if number % 10 == 0 else "diffusion_pytorch_model.safetensors")
        content = bytearray(path.read_bytes())
        original = copy.copy(content)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ModelError):
            load(folder)
        path.write_bytes(original)


def test_a_missing_file_and_a_damaged_list(tmp_path, tiny_discovery):
    folder = shutil.copytree(tiny_discovery, tmp_path / "model")
    listed = json.loads((folder / "checksums.json").read_text())
    assert set(listed["sha256"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    for text in ("{}", '{"sha256": {"../other": "00"}}', '{"sha256": 3}', "no json"):
        (folder / "checksums.json").write_text(text)
        with pytest.raises(ModelError):
            StructureDiscoveryModel.from_pretrained(folder)
