"""Strict loading of repositories: no code is executed, and unknown entries are errors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffdiscover3d
from diffdiscover3d.errors import ModelError
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline

# as written by version 0.1.0 and published
STORED_INDEX = """{
  "_class_name": "DiffusionFeaturePipeline",
  "_diffusers_version": "0.42.1",
  "scheduler": ["diffusers", "DDPMScheduler"],
  "unet": ["diffdiscover3d", "UNet3DModel"]
}"""


@pytest.fixture
def repo(tmp_path):
    torch.manual_seed(0)
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
    DiffusionFeaturePipeline(unet, make_scheduler(250)).save_pretrained(tmp_path / "repo")
    for path in (tmp_path / "repo").rglob("checksums.json"):  # repositories of earlier versions have none
        path.unlink()
    return tmp_path / "repo"


def edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_what_was_stored(repo):
    assert json.loads((repo / "model_index.json").read_text()).keys() == json.loads(STORED_INDEX).keys()
    assert json.loads((repo / "model_index.json").read_text())["unet"] == json.loads(STORED_INDEX)["unet"]


def test_an_old_repository_survives_a_moved_source_file(repo, tmp_path):
    """A package with a moved UNet module loads the stored index, in a subprocess."""
    (repo / "model_index.json").write_text(STORED_INDEX)
    moved = tmp_path / "moved" / "diffdiscover3d"
    shutil.copytree(Path(diffdiscover3d.__file__).parent, moved, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (moved / "models" / "unet_3d.py").rename(moved / "models" / "volume_unet.py")
    for file in moved.rglob("*.py"):
        file.write_text(re.sub(r"models\.unet_3d\b", "models.volume_unet", file.read_text()))
    code = (
        "import sys; from diffdiscover3d import DiffusionFeaturePipeline as P;"
        f"p = P.from_pretrained({str(repo)!r}); print(type(p.unet).__module__)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "moved"), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == "diffdiscover3d.models.volume_unet", done.stderr[-2000:]


def test_an_index_with_a_module_path_is_brought_up(repo):
    edit(repo / "model_index.json", unet=["diffdiscover3d.models.unet_3d", "UNet3DModel"])
    assert isinstance(DiffusionFeaturePipeline.from_pretrained(repo).unet, UNet3DModel)
    edit(repo / "model_index.json", unet=["diffdiscover3d.somewhere.long_gone", "UNet3DModel"])
    assert isinstance(VolumeGenerationPipeline.from_pretrained(repo).unet, UNet3DModel)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["evil", "UNet3DModel"]},
        {"unet": ["diffdiscover3d", "StructureDiscoveryModel"]},
        {"scheduler": ["os", "system"]},
        {"scheduler": ["diffusers", "DiffusionPipeline"]},
        {"unet": [None, None]},
        {"safety_checker": ["diffdiscover3d", "UNet3DModel"]},
        {"strength": 0.5},
    ],
)
def test_other_classes_in_the_index_are_refused(repo, changes):
    (repo / "evil.py").write_text("raise SystemExit('executed')")
    (repo / "unet" / "evil.py").write_text("raise SystemExit('executed')")
    edit(repo / "model_index.json", **changes)
    with pytest.raises(ModelError, match=next(iter(changes))):
        DiffusionFeaturePipeline.from_pretrained(repo)


def test_unknown_options_are_refused(repo):
    edit(repo / "scheduler" / "scheduler_config.json", noise_boost=2)
    with pytest.raises(ModelError, match="noise_boost"):
        DiffusionFeaturePipeline.from_pretrained(repo)
    edit(repo / "unet" / "config.json", extra_levels=2)
    with pytest.raises(ModelError, match="extra_levels"):
        UNet3DModel.from_pretrained(repo / "unet")


@pytest.mark.parametrize("name", ["custom_pipeline", "trust_remote_code"])
def test_code_from_a_repository_is_refused(repo, name):
    with pytest.raises(ValueError, match=f"`{name}` would run code"):
        DiffusionFeaturePipeline.from_pretrained(repo, **{name: "user/evil"})


def test_pickled_weights_are_not_read(repo):
    for weights in repo.rglob("*.safetensors"):
        torch.save(UNet3DModel.from_pretrained(repo / "unet").state_dict(), weights.with_suffix(".bin"))
        weights.unlink()
    with pytest.raises(Exception, match="safetensors"):
        UNet3DModel.from_pretrained(repo / "unet")
    with pytest.raises(Exception, match="safetensors"):
        DiffusionFeaturePipeline.from_pretrained(repo)


def test_a_missing_shard_is_an_error(tmp_path):
    StructureDiscoveryModel(num_parts=2).save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    model = StructureDiscoveryModel.from_pretrained(tmp_path)
    assert model.config.num_parts == 2
    shards[0].unlink()
    with pytest.raises((OSError, ModelError)):
        StructureDiscoveryModel.from_pretrained(tmp_path)


def test_what_is_no_hub_id_is_said():
    for kind in (UNet3DModel, StructureDiscoveryModel, DiffusionFeaturePipeline):
        with pytest.raises(ModelError, match="user/name"):
            kind.from_pretrained("no-such-folder")
