"""What diffusers needs to load pipelines that hold our UNet, from a folder or from the Hub.

diffusers knows the libraries of its own components only: registering ours makes `model_index.json` say
`["diffdiscover3d", "UNet3DModel"]`, which survives moving source files. `DiffusionPipeline.download` rejects modules
it does not know before it would find that entry, so pipelines here fetch the verified snapshot instead; it holds
nothing but configs and safetensors, and `model_index.json` may name no other classes than the ones expected.
"""

import os
from pathlib import Path

from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.pipelines import pipeline_loading_utils

import diffdiscover3d
from diffdiscover3d.errors import ModelError
from diffdiscover3d.models.loading import DOWNLOAD_OPTIONS, PushMixin
from diffdiscover3d.utils.files import read_model_json

LIBRARY = "diffdiscover3d"
_COMPONENTS = {
    "unet": {(LIBRARY, "UNet3DModel")},
    "scheduler": {("diffusers", "DDPMScheduler"), ("diffusers", "DDIMScheduler")},
}


def register_library() -> None:
    """Make diffusers import our model classes from the root of this package. Harmless when called again."""
    entry = {"UNet3DModel": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(LIBRARY, entry)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(entry)


class HubPipelineMixin(PushMixin):
    """Put before `DiffusionPipeline`: loads by Hub id, data only, and pushes with a card."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a folder or a Hub id, as in diffusers; strict, and never running code from the repository.

        Args:
            pretrained_model_name_or_path: folder or `user/name`.
            revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.

        Raises:
            ModelError: if a component is of another class than expected, a config has unknown keys, or weights are
                missing.
            NetworkError: if the repository cannot be fetched whole.
            ValueError: for `custom_pipeline` and `trust_remote_code`.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if kwargs.pop(name, None):
                raise ValueError(f"`{name}` would run code from the repository, which pipelines here never do.")
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(folder, **{k: kwargs.pop(k) for k in DOWNLOAD_OPTIONS if k in kwargs})
        _check_scheduler(Path(folder))
        return super().from_pretrained(folder, **{**kwargs, "use_safetensors": True})

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str:
        """Fetch the configs and safetensors of a repository into the cache, verified; return the snapshot's folder."""
        options = {k: v for k, v in kwargs.items() if k in DOWNLOAD_OPTIONS and v is not None}
        return str(diffdiscover3d.fetch_snapshot(str(pretrained_model_name), **options))

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        """Read `model_index.json`; a component of an unexpected class is an error, an old module path is brought up."""
        found = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = found[0] if isinstance(found, tuple) else found
        for name, value in index.items():
            if name.startswith("_"):
                continue
            library, kind = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
            if str(library).startswith(f"{LIBRARY}."):
                library = LIBRARY  # recorded by source file, which may have moved since
            if (library, kind) not in _COMPONENTS.get(name, ()):
                expected = sorted(_COMPONENTS.get(name, ())) or "no such entry"
                raise ModelError(
                    f"{pretrained_model_name_or_path}: model_index.json says {name!r} is {value!r}, expected "
                    f"{expected}; it was written for another pipeline."
                )
            index[name] = [library, kind]
        if not isinstance(index.get("_class_name"), str):
            raise ModelError(f"model_index.json has the class {index.get('_class_name')!r}, which must be a name.")
        return found


def _check_scheduler(folder: Path) -> None:
    """diffusers only warns about scheduler options it does not know; they could change every result."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return  # diffusers names what is missing
    known = DDPMScheduler._get_init_keys(DDPMScheduler) | DDIMScheduler._get_init_keys(DDIMScheduler)
    unknown = sorted(k for k in read_model_json(path) if not k.startswith("_") and k not in known)
    if unknown:
        raise ModelError(f"{path}: has unknown keys {unknown}; remove them, or upgrade diffusers.")
