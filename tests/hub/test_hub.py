"""Sharing models through a Hub on 127.0.0.1, with unpatched huggingface_hub in subprocesses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from diffdiscover3d.errors import ModelError, NetworkError, OutputError
from diffdiscover3d.hub.download import _find_damage, _list_files
from diffdiscover3d.hub.registry import embedded_models, load_teacher, pull
from diffdiscover3d.hub.upload import _hide_paths
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from tests.helpers.loopback_hub import TOKEN, LoopbackHub, git_hash

PRELUDE = """
import contextlib, io, json, sys
def cli(*arguments):
    from diffdiscover3d.cli import app as cli
    sys.argv = ["diffdiscover3d", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue().strip(), err.getvalue().strip()
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


def python(code: str, environment: dict[str, str], **values):
    """Run code in a subprocess with `values` as its globals; return its variable `answer`."""
    script = PRELUDE + f"globals().update(json.loads({json.dumps(json.dumps(values))}))\n" + code
    script += "\nprint('\\nANSWER' + json.dumps(answer))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**clean, **environment}, timeout=300
    )
    assert "\nANSWER" in done.stdout, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.split("\nANSWER")[1])


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_discovery):
    """A discovery network and a diffusion pipeline as trainings write them, and a scan."""
    root = tmp_path_factory.mktemp("trained")
    discovery, diffusion = root / "discovery", root / "diffusion"
    discovery.mkdir()
    for file in tiny_discovery.iterdir():
        (discovery / file.name).write_bytes(file.read_bytes())
    options = {
        "preset": "small",
        "dataset": "/home/somebody/secret/scans",
        "num_parts": 3,
        "teacher": "/home/x/teacher",
    }
    (discovery / "train_config.json").write_text(json.dumps(options))
    (discovery / "checkpoints" / "checkpoint-00000001").mkdir(parents=True)
    (discovery / "checkpoints" / "checkpoint-00000001" / "model.safetensors").write_bytes(b"private")
    (discovery / "log.jsonl").write_text('{"step": 1}\n')
    (discovery / "parts").mkdir()
    for name in ("jane_dseg.png", "jane_dseg.json", "diffusion_pytorch_model.safetensors", "README.md"):
        (discovery / "parts" / name).write_bytes(b"a patient's")
    for name in ("jane.png", "jane.json", "jane.safetensors", "jane.md", "diffusion_pytorch_model.bin"):
        (discovery / name).write_bytes(b"a patient's")
    (discovery / "unet").mkdir()
    (discovery / "unet" / "jane.json").write_bytes(b"a patient's")
    (discovery / "previews").mkdir()
    for step in (1, 2):
        (discovery / "previews" / f"parts-{step:08d}.png").write_bytes(b"picture of step %d" % step)
    weights = hashlib.sha256((discovery / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    rows = [{"method": "diffdiscover3d", "parts": 3, "dice": 0.51234}, {"method": "k-means", "parts": 3, "dice": 0.4}]
    scores = {
        "model": str(discovery),
        "rows": rows,
        "weights_sha256": {"diffusion_pytorch_model.safetensors": weights},
    }
    (discovery / "scores.json").write_text(json.dumps(scores))
    torch.manual_seed(0)
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2, 2), attention=(None,) * 3, norm_groups=4).eval()
    DiffusionFeaturePipeline(unet, make_scheduler(250)).save_pretrained(diffusion)
    data = np.random.default_rng(0).normal(size=(14, 10, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([-1, 1, 2, 1])), root / "scan.nii.gz")
    return root


@pytest.fixture(scope="module")
def pushed(hub, models, tmp_path_factory):
    """Push all models from one cache, by commands and from Python; the answer of each call."""
    hub.put("user/mixed", {"notes/scores.json": b"{}", "LICENSE": b"free"})
    # imported first: with some versions, diffusers and MONAI (through zarr) warn on stderr when they are imported
    code = """
import monai
from diffdiscover3d import DiffusionFeaturePipeline, StructureDiscoveryModel, UNet3DModel
answer = {}
answer["parts"] = cli("push", root + "/discovery", "user/parts", "--commit-message", "first parts", "-q")
answer["again"] = cli("push", root + "/discovery", "user/parts")
answer["request"] = cli("push", root + "/diffusion", "user/parts", "--create-pr")
answer["branch"] = cli("push", root + "/diffusion", "user/cells", "--revision", "v2")
answer["private"] = cli("push", root + "/discovery", "user/hidden", "--private")
cli("push", root + "/discovery", "user/mixed")
answer["mixed"] = cli("push", root + "/diffusion", "user/mixed")
answer["none"] = cli("push", root, "user/none")
answer["bad"] = cli("push", root + "/discovery", "../etc/passwd")
answer["embedded"] = cli("push", embedded, "user/brain-flair-diffusion", "-q")
pipe = DiffusionFeaturePipeline.from_pretrained(root + "/diffusion")
answer["pipe"] = pipe.push_to_hub("user/cells")
answer["unet"] = pipe.unet.push_to_hub("user/unet", max_shard_size="20KB", private=True)
network = StructureDiscoveryModel.from_pretrained(root + "/discovery")
answer["sharded"] = network.push_to_hub("user/sharded", max_shard_size="100KB", commit_message="in shards")
flair = DiffusionFeaturePipeline.from_pretrained("brain-flair")
answer["flair"] = flair.push_to_hub("user/flair"), flair.unet.push_to_hub("user/flair-unet", max_shard_size="2MB")
flair.unet.conv_out.bias.data += 1
halved = StructureDiscoveryModel.from_pretrained("brain-flair").bfloat16()
answer["halved"] = halved.push_to_hub("user/flair-halved")
answer["changed"] = flair.push_to_hub("user/flair-changed")
answer["whole"] = network.push_to_hub("user/sharded", scores={"rows": [{"method": "diffdiscover3d", "dice": 0.5}]})
"""
    embedded = str(embedded_models()["brain-flair"].diffusion)
    return python(code, hub.environment(tmp_path_factory.mktemp("pusher")), root=str(models), embedded=embedded)


def test_a_push_is_one_commit(hub, pushed):
    repo = hub.repos["models", "user/parts"]
    code, out, err = pushed["parts"]
    assert (code, err) == (0, "") and out == f"{hub.url}/user/parts/commit/{list(repo.commits)[1]}"
    assert pushed["again"][0] == 0 and repo.messages[0] == "first parts"
    assert len(repo.messages) == 2, "the second push of the same files makes no commit, the request makes one"
    files = repo.files("main")
    assert set(files) == {
        "README.md", "checksums.json", "config.json", "diffusion_pytorch_model.safetensors", "scores.json",
        "train_config.json",
    }  # fmt: skip
    for secret in ("/home", "somebody", "patient", TOKEN):
        assert not any(secret.encode() in content for content in files.values())
    assert json.loads(files["train_config.json"])["dataset"] == "scans"


def test_files_of_an_earlier_model_are_deleted(hub, pushed):
    """A diffusion model replaces a discovery network; only files that this package does not write remain."""
    assert pushed["mixed"][0] == 0
    files = set(hub.repos["models", "user/mixed"].files("main"))
    assert files == {
        "README.md", "checksums.json", "model_index.json", "scheduler/scheduler_config.json", "unet/checksums.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "notes/scores.json", "LICENSE",
    }  # fmt: skip


def test_relative_paths_are_shortened_at_every_depth(tmp_path, monkeypatch):
    """`stmary/jane-doe` has the form of a Hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stmary" / "jane-doe").mkdir(parents=True)
    config = {"_class_name": "X", "parent": {"_name_or_path": "stmary/jane-doe", "parent": "user/coarse"}}
    options = {"dataset": "stmary/other", "teacher": "stmary/jane-doe", "init_from": "user/network", "preset": "brats"}
    options |= {"output_dir": "stmary/out", "resume": "C:\\stmary\\out\\", "sources": [{"dataset": ["stmary/a"]}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "train_config.json").write_text(json.dumps(options))
    _hide_paths(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["parent"] == {
        "_name_or_path": "jane-doe",
        "parent": "user/coarse",
    }
    assert json.loads((tmp_path / "train_config.json").read_text()) == {
        "dataset": "other", "teacher": "jane-doe", "init_from": "user/network", "preset": "brats",
        "output_dir": "out", "resume": "out", "sources": [{"dataset": ["a"]}],
    }  # fmt: skip
    for dataset in ("hf://datasets/user/cells", "synthetic-regular"):
        (tmp_path / "train_config.json").write_text(json.dumps({"dataset": dataset}))
        _hide_paths(tmp_path)
        assert json.loads((tmp_path / "train_config.json").read_text()) == {"dataset": dataset}


def test_no_path_of_the_pusher_is_published(hub, pushed, models):
    for name in ("parts", "cells", "unet", "sharded"):
        for revision in hub.repos["models", f"user/{name}"].commits:
            for file, content in hub.repos["models", f"user/{name}"].files(revision).items():
                assert str(models).encode() not in content, (name, file)


def test_the_card_of_a_push(pushed, hub):
    card = hub.repos["models", "user/parts"].files("main")["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "diffdiscover3d" and metadata["license"] == "apache-2.0"
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"][0]["type"] == "dice" and result["metrics"][0]["value"] == 0.5123
    assert "preview.png" not in card and "| k-means | 0.400 |" in card and "--model user/parts" in card


def test_pull_requests_branches_and_private_repositories(hub, pushed):
    assert pushed["request"] == [0, f"{hub.url}/user/parts/discussions/1", ""]
    assert "model_index.json" in hub.repos["models", "user/parts"].files("refs/pr/1")
    assert "model_index.json" not in hub.repos["models", "user/parts"].files("main")
    cells = hub.repos["models", "user/cells"]
    assert pushed["branch"][0] == 0 and "unet/config.json" in cells.files("v2")
    assert hub.repos["models", "user/hidden"].private and not hub.repos["models", "user/parts"].private
    assert hub.repos["models", "user/unet"].private


def test_refused_pushes(hub, pushed):
    code, out, err = pushed["none"]
    assert (code, out) == (5, "") and "diffusion, discovery" in err and len(err.splitlines()) == 1
    assert pushed["bad"][0] == 5 and "user/name" in pushed["bad"][2]
    assert ("models", "user/none") not in hub.repos


def test_all_shards_are_replaced(hub, pushed):
    repo = hub.repos["models", "user/sharded"]
    first, second = list(repo.commits.values())[1:]
    assert sum("-of-0" in name for name in first) > 1 and "diffusion_pytorch_model.safetensors.index.json" in first
    assert [n for n in second if n.endswith(".safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert repo.messages[0] == "in shards"


LOAD = """
import hashlib
from pathlib import Path
import torch
from diffdiscover3d import DiffusionFeaturePipeline, StructureDiscoveryModel, UNet3DModel, VolumeGenerationPipeline
answer = {}
code, out, err = cli("segment", root + "/scan.nii.gz", "--model", "user/parts", "-o", output)
assert code == 0, err
if local:
    assert cli("segment", root + "/scan.nii.gz", "--model", root + "/discovery", "-o", local)[0] == 0
answer["model"] = json.loads(Path(output, "scan_dseg.json").read_text())["model"]
answer["labels"] = hashlib.sha256(Path(output, "scan_dseg.nii.gz").read_bytes()).hexdigest()
network = StructureDiscoveryModel.from_pretrained("user/parts")
pipe = DiffusionFeaturePipeline.from_pretrained("user/cells")
VolumeGenerationPipeline.from_pretrained("user/cells", revision="v2")
unet = UNet3DModel.from_pretrained("user/unet")
sharded = StructureDiscoveryModel.from_pretrained("user/sharded", revision=shards)
for a, b in ((pipe.unet, unet), (network, sharded)):
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
out = pipe(root + "/scan.nii.gz", stages=(1,), generator=torch.Generator().manual_seed(0))
answer["features"] = hashlib.sha256(out.features[0].numpy().tobytes()).hexdigest()
answer["weights"] = hashlib.sha256(
    (Path(cli("pull", "user/parts")[1]) / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
"""


PULL = """
answer["weights_in"] = cli("pull", "user/parts")[1]
answer["pulled"] = cli("pull", "user/parts", folder + "/model", "-q")
answer["exists"] = cli("pull", "user/parts", folder + "/model")
answer["replaced"] = cli("pull", "user/parts", folder + "/model", "--overwrite")
answer["precious"] = cli("pull", "user/parts", folder + "/precious", "--overwrite")
answer["trained"] = cli("pull", "user/parts", folder + "/trained", "--overwrite")
from pathlib import Path
(Path(answer["weights_in"]) / "evil.py").write_text("raise SystemExit(1)")
answer["beside"] = cli("pull", "user/parts", folder + "/beside")
(Path(answer["weights_in"]) / "evil.py").unlink()
answer["cached"] = cli("pull", "user/parts", "--local-files-only")
answer["uncached"] = cli("pull", "user/hidden", "--local-files-only")
answer["revision"] = cli("pull", "user/parts", "--revision", "v9")
answer["missing"] = cli("pull", "user/nothing")
answer["embedded"] = cli("pull", "user/brain-flair-diffusion", folder + "/embedded", "-q")
"""


@pytest.fixture(scope="module")
def pulled(hub, pushed, models, tmp_path_factory):
    """Load and pull all models into an empty cache: the answers, the folder, the inputs of a second process."""
    folder = tmp_path_factory.mktemp("pulled")
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("years of work")
    shutil.copytree(models / "discovery", folder / "trained")
    (folder / "trained" / "checkpoints" / "one").write_text("weeks of training")
    shards = list(hub.repos["models", "user/sharded"].commits)[1]
    values = {"root": str(models), "shards": shards, "local": "", "folder": str(folder)}
    answer = python(LOAD + PULL, hub.environment(folder / "cache"), output=str(folder / "online"), **values)
    return answer, folder, values


def test_pulled_models_are_the_same_bit_for_bit_and_work_offline(hub, pulled, models):
    """Pushed from one cache, pulled into an empty one, then used without the Hub."""
    online, folder, values = pulled
    requests = sum(hub.requests.values())
    values = {**values, "output": str(folder / "offline"), "local": str(folder / "local")}
    offline = python(LOAD, hub.environment(folder / "cache", None, HF_HUB_OFFLINE="1"), **values)
    assert sum(hub.requests.values()) == requests
    assert offline == {name: online[name] for name in offline}
    weights = models / "discovery" / "diffusion_pytorch_model.safetensors"
    assert online["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert online["model"]["sha256"] == {weights.name: online["weights"]}
    assert online["model"]["commit"] == hub.repos["models", "user/parts"].refs["main"]
    labels = [(folder / place / "scan_dseg.nii.gz").read_bytes() for place in ("online", "offline", "local")]
    assert labels[0] == labels[1] == labels[2]


def test_segment_offline_sends_no_request(hub, pulled, models, tmp_path):
    online, folder, _ = pulled
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    scan, asked = models / "scan.nii.gz", sum(hub.requests.values())
    for cache, code in ((folder / "cache", 0), (tmp_path / "empty", 6)):
        command = [
            sys.executable,
            "-m",
            "diffdiscover3d.cli",
            "segment",
            str(scan),
            "-m",
            "user/parts",
            "--offline",
        ]
        environment = {**clean, **hub.environment(cache)}
        command += ["-o", str(tmp_path / str(code))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == code, done.stderr
    assert "cache" in done.stderr and sum(hub.requests.values()) == asked
    labels = (tmp_path / "0" / "scan_dseg.nii.gz").read_bytes()
    assert hashlib.sha256(labels).hexdigest() == online["labels"]


def test_the_embedded_diffusion_model_of_brains_can_be_shared(pushed, pulled):
    answer, folder, _ = pulled
    assert pushed["embedded"][0] == 0 and answer["embedded"] == [0, str(folder / "embedded"), ""]
    own = embedded_models()["brain-flair"].diffusion
    names = {p.relative_to(folder / "embedded").as_posix() for p in (folder / "embedded").rglob("*") if p.is_file()}
    assert names == {p.relative_to(own).as_posix() for p in own.rglob("*") if p.is_file()} | {"README.md"}
    card = (folder / "embedded" / "README.md").read_text()
    assert card == (own.parent / "README.md").read_text()
    assert "CC-BY 4.0" in card  # this licence requires attribution
    weights = load_teacher("brain-flair").unet.state_dict()
    again = load_teacher(str(folder / "embedded")).unet.state_dict()
    assert weights.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in weights.items())


def test_the_weights_of_an_embedded_model_keep_its_card(hub, pushed):
    """A loaded pipeline is saved in another type and in shards; weights that were changed are another model."""
    assert len(pushed["flair"]) == 2
    own = (embedded_models()["brain-flair"].folder / "README.md").read_bytes()
    for name in ("user/flair", "user/flair-unet", "user/flair-halved"):
        assert hub.repos["models", name].files("main")["README.md"] == own
    assert any("-of-" in file for file in hub.repos["models", "user/flair-unet"].files("main"))
    card = hub.repos["models", "user/flair-changed"].files("main")["README.md"]
    assert card != own and b"flair-changed" in card


def test_pull_to_a_folder(pulled):
    answer, folder, _ = pulled
    assert answer["pulled"] == [0, str(folder / "model"), ""] and answer["replaced"][0] == 0
    assert (folder / "model" / "README.md").is_file() and not (folder / "model" / "config.json").is_symlink()
    assert answer["exists"][0] == 4 and "--overwrite" in answer["exists"][2]
    assert answer["precious"][0] == 5 and (folder / "precious" / "thesis.txt").exists()
    assert answer["trained"][0] == 4 and "checkpoints" in answer["trained"][2]
    assert (folder / "trained" / "checkpoints" / "one").exists()
    assert answer["beside"][0] == 0 and not (folder / "beside" / "evil.py").exists()
    assert {p.name for p in (folder / "beside").iterdir()} == {p.name for p in (folder / "model").iterdir()}
    assert answer["cached"][0] == 0
    assert [answer[k][0] for k in ("uncached", "revision", "missing")] == [6, 6, 6]
    assert "v9" in answer["revision"][2] and "private" in answer["missing"][2]


def test_what_a_pull_may_replace(tiny_discovery, tmp_path, monkeypatch):
    monkeypatch.setattr("diffdiscover3d.hub.registry.fetch_snapshot", lambda *_, **__: tiny_discovery)
    names = {path.name for path in tiny_discovery.iterdir()}
    model, file, link = tmp_path / "model", tmp_path / "thesis.pdf", tmp_path / "link"
    file.write_bytes(b"years of work")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for place in (file, tmp_path / "nowhere"):
        with pytest.raises(OutputError, match="is not a folder"):
            pull("user/parts", place, overwrite=True)
    assert file.read_bytes() == b"years of work"
    pull("user/parts", model)
    link.symlink_to(model)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert pull("user/parts", link, overwrite=True) == link and link.is_symlink()
    assert (model / "config.json").read_bytes() == (tiny_discovery / "config.json").read_bytes()
    monkeypatch.chdir(model)
    pull("user/parts", ".", overwrite=True)
    assert {path.name for path in model.iterdir()} == names
    (model / "parts").mkdir()
    (model / "parts" / "scan_dseg.nii.gz").write_bytes(b"a result")
    with pytest.raises(OutputError, match=r"holds parts.scan_dseg\.nii\.gz, which is no file of a model"):
        pull("user/parts", model, overwrite=True)
    assert (model / "parts" / "scan_dseg.nii.gz").read_bytes() == b"a result"


FETCH = """
from diffdiscover3d.hub.download import fetch_snapshot
from pathlib import Path
answer = {}
for name in names:
    try:
        folder = fetch_snapshot(name)
        answer[name] = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    except Exception as error:
        answer[name] = f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def repo(hub):
    """A separate repository for each test of faults: its name and that of a large file."""
    name = f"user/faulty-{time.time_ns()}"
    weights = f"w{time.time_ns()}.safetensors"
    hub.put(name, {"config.json": b"{}", weights: bytes(range(256)) * 64, "evil.py": b"raise SystemExit(1)"})
    return name, weights


@pytest.mark.parametrize(("fault", "times"), [("cut", 2), ("500", 1), ("wrong", 1)])
def test_transient_faults_are_retried(hub, repo, tmp_path, fault, times):
    name, weights = repo
    hub.faults[weights] = [fault, times]
    assert python(FETCH, hub.environment(tmp_path), names=[name])[name] == ["config.json", weights]
    assert hub.faults[weights][1] == 0, "the fault was met"


def test_a_persistent_wrong_hash_is_refused_and_not_cached(hub, repo, tmp_path):
    name, weights = repo
    hub.faults[weights] = ["wrong", 1000]
    answer = python(FETCH, hub.environment(tmp_path), names=[name])[name]
    assert answer.startswith("NetworkError") and weights in answer
    offline = python(FETCH, hub.environment(tmp_path, HF_HUB_OFFLINE="1"), names=[name])[name]
    assert offline.startswith("NetworkError"), "no half snapshot afterwards"
    hub.faults.clear()
    assert weights in python(FETCH, hub.environment(tmp_path), names=[name])[name]


def test_a_connection_that_always_breaks_leaves_no_partial_model(hub, repo, tmp_path):
    name, weights = repo
    hub.faults[weights] = ["cut", 1000]
    answer = python(FETCH, hub.environment(tmp_path), names=[name])[name]
    assert answer.startswith("NetworkError"), answer
    offline = python(FETCH, hub.environment(tmp_path, HF_HUB_OFFLINE="1"), names=[name])[name]
    assert offline.startswith("NetworkError") and "cache" in offline


def test_a_hub_that_is_down(hub, repo, tmp_path):
    """Models in the cache still work; others end in an error of one line."""
    name, weights = repo
    python(FETCH, hub.environment(tmp_path), names=[name])
    hub.down = True
    try:
        answer = python(FETCH, hub.environment(tmp_path), names=[name, "user/other"])
    finally:
        hub.down = False
    assert weights in answer[name]
    assert answer["user/other"].startswith("NetworkError") and "\n" not in answer["user/other"]


def test_damage_in_the_cache_is_found_offline_and_repaired_online(hub, repo, tmp_path):
    name, weights = repo
    python(FETCH, hub.environment(tmp_path), names=[name])
    blob = next(tmp_path.rglob(weights)).resolve()
    whole = blob.read_bytes()
    for mode in ("online", "offline"):
        blob.write_bytes(whole[:-1] + b"x")
        environment = hub.environment(tmp_path, **({"HF_HUB_OFFLINE": "1"} if mode == "offline" else {}))
        answer = python(FETCH, environment, names=[name])[name]
        assert (weights in answer) if mode == "online" else answer.startswith("NetworkError"), (mode, answer)


def test_private_repositories_need_the_token(hub, repo, tmp_path):
    name, weights = repo
    hub.repos["models", name].private = True
    answer = python(FETCH, hub.environment(tmp_path, token=None), names=[name])[name]
    assert answer.startswith("NetworkError") and "hf auth login" in answer
    assert weights in python(FETCH, hub.environment(tmp_path), names=[name])[name]


@pytest.mark.parametrize(("status", "refused"), [(403, True), (429, True), (503, False)])
def test_a_refused_listing_is_an_error(monkeypatch, status, refused):
    from unittest.mock import Mock

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(*_, **__):
        raise HfHubHTTPError("no", response=Mock(status_code=status, headers={}))

    monkeypatch.setattr(HfApi, "list_repo_tree", refuse)
    if refused:
        with pytest.raises(NetworkError, match="user/name: cannot be fetched"):
            _list_files("user/name", "0" * 40, None)
    else:
        assert _list_files("user/name", "0" * 40, None) is None


@pytest.mark.parametrize("name", ["../../outside.json", "/etc/x.json", "a/../../x.json", "a\\x.json"])
def test_listed_names_that_leave_the_folder_are_named(tmp_path, name):
    with pytest.raises(
        ModelError, match=f"user/x: holds a file called {re.escape(repr(name))}, which would lie outside"
    ):
        _find_damage("user/x", tmp_path, {name: ("git", "0" * 40)})


def test_names_that_leave_the_folder_are_refused(hub, tmp_path):
    hub.put("user/traversal", {"config.json": b"{}", "../../outside.json": b"{}"})
    answer = python(FETCH, hub.environment(tmp_path / "a" / "b"), names=["user/traversal", "../x", "a/b/c"])
    assert answer["user/traversal"] != ["../../outside.json", "config.json"]
    assert "Error" in answer["user/traversal"] and not list(tmp_path.rglob("outside.json"))
    assert answer["../x"].startswith("ModelError") and answer["a/b/c"].startswith("ModelError")


def test_git_hashes():
    """As `git hash-object` gives them for an empty file and for "hello\\n"."""
    assert git_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    from diffdiscover3d.hub.download import file_hash

    path = Path(__file__)
    assert file_hash(path, "git") == git_hash(path.read_bytes())
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_all_levels_of_a_nested_network_on_the_hub(hub, models, tmp_path):
    code = """
from diffdiscover3d import StructureDiscoveryModel
coarse = StructureDiscoveryModel.from_pretrained(root + "/discovery")
StructureDiscoveryModel.from_parent(coarse, (2, 2, 2), norm="instance").push_to_hub("user/nested")
answer = [cli("segment", root + "/scan.nii.gz", "--model", "user/nested", "--level", level, "-o", output + level)
    for level in ("all", "1", "3")]
"""
    output = str(tmp_path / "out-")
    both, first, third = python(code, hub.environment(tmp_path / "cache"), root=str(models), output=output)
    assert both[0] == first[0] == 0 and third[0] == 5 and "has the levels [1, 2], not 3" in third[2]
    names = {p.name for p in Path(f"{output}all").glob("*")}
    assert {"scan_level-1_dseg.nii.gz", "scan_level-2_dseg.nii.gz", "scan_tree.json"} <= names
    one, alone = (nib.load(p) for p in (f"{output}all/scan_level-1_dseg.nii.gz", f"{output}1/scan_dseg.nii.gz"))
    np.testing.assert_array_equal(one.dataobj, alone.dataobj)
    model = json.loads(Path(f"{output}all", "scan_level-2_dseg.json").read_text())["model"]
    assert model["id"] == "user/nested" and model["commit"] == list(hub.repos["models", "user/nested"].commits)[-1]
