"""Loading files cannot run code: static check of the source, and tests with malicious files."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import diffdiscover3d
from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub.registry import embedded_models, load_discovery, load_teacher

ROOT = Path(diffdiscover3d.__file__).parent
# the two readers of third-party pickles and their permitted calls; the unpickler allows only numeric arrays
GUARDED = {
    ("models/authors_checkpoint.py", "torch.load(weights_only=True)"),
    ("baselines/med3d.py", "torch.load(weights_only=True)"),
    ("data/datasets/authors_archive.py", "pickle.Unpickler"),
}

# calls that can execute the content they read
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "cPickle.load", "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open",
    "pandas.read_pickle", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "__import__",
    "runpy.run_path", "runpy.run_module", "os.system", "os.popen", "importlib.util.spec_from_file_location",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "unpack_archive"}  # a member's path may lead out of the folder


def findings(source: str) -> set[str]:
    """The forbidden calls in a module, including those through imported names and aliases."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {name for base in node.bases if (name := dotted(base, names)) in FORBIDDEN}
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func, names), {k.arg: k.value for k in node.keywords}
        if name == "torch.load":
            safe = isinstance(value := keywords.get("weights_only"), ast.Constant) and value.value is True
            found.add("torch.load(weights_only=True)" if safe else "torch.load")
        elif name in FORBIDDEN or (name or "").split(".")[-1] in FORBIDDEN_METHODS:
            found.add(name)
        for keyword in ("trust_remote_code", "allow_pickle", "shell", "custom_pipeline"):
            value = keywords.get(keyword)
            if value is not None and not (isinstance(value, ast.Constant) and value.value in (False, None)):
                found.add(keyword)
    return found


def dotted(node, names: dict[str, str]) -> str | None:
    """The full name of a called function; methods of unnamed objects start with a dot."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(names.get(node.id, node.id))
    elif parts:
        parts.append("")
    return ".".join(reversed(parts)) or None


def test_the_source():
    found = {(p.relative_to(ROOT).as_posix(), what) for p in ROOT.rglob("*.py") for what in findings(p.read_text())}
    assert found == GUARDED


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("import pickle as p\np.loads(b)", "pickle.loads"),
        ("from pickle import load as read\nread(f)", "pickle.load"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import torch\ntorch.load(p)", "torch.load"),
        ("import torch\ntorch.load(p, weights_only=False)", "torch.load"),
        ("import torch\ntorch.load(p, weights_only=flag)", "torch.load"),
        ("from torch import load\nload(p, weights_only=True)", "torch.load(weights_only=True)"),
        ("eval('1')", "eval"),
        ("exec(code)", "exec"),
        ("tar.extractall(d)", "tar.extractall"),
        ("open_it().extractall(d)", ".extractall"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("f(trust_remote_code=flag)", "trust_remote_code"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "allow_pickle"),
        ("import yaml\nyaml.load(t, Loader=L)", "yaml.load"),
    ],
)
def test_the_walk_finds(source, expected):
    assert expected in findings(source)


def test_the_walk_leaves_harmless_calls_alone():
    source = "model.eval()\nload(p).eval()\nimport re\nre.compile('a')\nf(trust_remote_code=False)\nyaml.safe_load(t)"
    assert not findings(source)


# hostile model folders


class _Evil:
    def __reduce__(self):
        return (open, ("diffdiscover3d-was-executed", "w"))


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A valid diffusion model to modify; checks afterwards that no code from it has run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(embedded_models()["synthetic-regular"].diffusion, folder)
    yield folder
    assert not (tmp_path / "diffdiscover3d-was-executed").exists()


CODE = "open('diffdiscover3d-was-executed', 'w')\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "change",
    [
        {"unet": ["evil", "Evil"]},
        {"unet": ["../evil", "Evil"]},
        {"unet": ["os", "system"]},
        {"unet": ["torch", "Tensor"]},
        {"unet": "evil.Evil"},
        {"scheduler": ["diffdiscover3d.hub.registry", "load_teacher"]},
        {"scheduler": ["diffusers", "PNDMScheduler"]},
        {"extra": ["evil", "Evil"]},
        {"_class_name": ["evil", "Evil"]},
    ],
)
def test_an_index_that_names_code_is_refused(hostile, change):
    for place in ("evil.py", "unet/evil.py", "../evil.py"):
        (hostile / place).write_text(CODE)
    index = json.loads((hostile / "model_index.json").read_text())
    (hostile / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_teacher(str(hostile))


def test_unknown_configuration_keys_are_refused(hostile):
    config = json.loads((hostile / "unet" / "config.json").read_text())
    (hostile / "unet" / "config.json").write_text(json.dumps({**config, "activation": "os.system"}))
    (hostile / "unet" / "checksums.json").unlink()  # as in a folder by another program
    with pytest.raises(ModelError, match="unknown keys"):
        load_teacher(str(hostile))


def test_a_pickle_in_the_place_of_the_weights_is_not_read(hostile, tiny_discovery, tmp_path):
    (hostile / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"w": _Evil()}, hostile / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_teacher(str(hostile))
    (hostile / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ModelError):
        load_teacher(str(hostile))
    other = tmp_path / "discovery"
    shutil.copytree(tiny_discovery, other)
    (weights,) = other.glob("*.safetensors")
    weights.unlink()
    torch.save({"w": _Evil()}, other / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_discovery(str(other))


@pytest.mark.parametrize(
    "name", ["../models/a", "user/../../etc", "/etc/passwd", "user/na me", "user/name/more", "-x/y"]
)
def test_ids_that_are_paths_are_refused(name):
    with pytest.raises(ModelError, match="no such folder, and no Hub id"):
        load_discovery(name)


def test_progress_bars_of_diffusers_stay_as_they_were(tiny_discovery):
    from diffusers.utils import logging

    load_discovery(str(tiny_discovery))
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    load_discovery(str(tiny_discovery))
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
