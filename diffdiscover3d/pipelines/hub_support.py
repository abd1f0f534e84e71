"""Integration with diffusers for loading pipelines with a [`UNet3DModel`] from a folder or the Hub.

`register_library` registers this package with diffusers, so that `model_index.json` refers to the UNet as
`["diffdiscover3d", "UNet3DModel"]`, independent of the source file. `DiffusionPipeline.download` rejects unregistered
modules before resolving that entry, so the pipelines override it to fetch a verified snapshot. The snapshot contains
only configs and safetensors, and `model_index.json` may refer only to the expected classes.
"""

import os
from pathlib import Path

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils

import diffdiscover3d
from diffdiscover3d.errors import ModelError
from diffdiscover3d.models.config_schema import read_config
from diffdiscover3d.models.embedded import embedded_folder
from diffdiscover3d.models.loading import DOWNLOAD_OPTIONS, PushMixin
from diffdiscover3d.utils.checksums import verify_checksums, write_checksums

LIBRARY = "diffdiscover3d"
_COMPONENTS = {"unet": "UNet3DModel of diffdiscover3d", "scheduler": "a scheduler of diffusers"}


def register_library() -> None:
    """Register this package's model classes with diffusers. Idempotent."""
    entry = {"UNet3DModel": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(LIBRARY, entry)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(entry)


def register_pipeline(pipeline: type) -> type:
    """Let `diffusers.DiffusionPipeline.from_pretrained` find a pipeline class, which it looks up in `diffusers`."""
    register_library()
    setattr(diffusers, pipeline.__name__, pipeline)
    return pipeline


class HubPipelineMixin(PushMixin):
    """Adds strict loading without remote code, and `push_to_hub`; must precede `DiffusionPipeline` in the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a pipeline as in diffusers, but strictly and without running code from the repository.

        Args:
            pretrained_model_name_or_path: the name of an embedded model (a folder of that name is `./name`), a folder,
                or a Hub id `user/name`.
            dtype: type of the weights; default: float32.
            revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.

        Raises:
            ModelError: if a component has an unexpected class, a config has unknown keys, or weights are missing.
            NetworkError: if the repository cannot be downloaded completely.
            ValueError: if `custom_pipeline` or `trust_remote_code` is given.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if kwargs.pop(name, None):
                raise ValueError(f"`{name}` would run code from the repository, which is not supported.")
        folder = embedded_folder(pretrained_model_name_or_path, "diffusion") or pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(folder, **{k: kwargs.pop(k) for k in DOWNLOAD_OPTIONS if k in kwargs})
        _check_scheduler(Path(folder))
        pipeline = super().from_pretrained(folder, **{**kwargs, "use_safetensors": True})
        verify_checksums(folder)  # after the checks that name a faulty entry
        return pipeline

    def to(self, *args, **kwargs):
        """Move or cast as in diffusers, without its warning that float16 fails on a CPU: it works, slowly."""
        return super().to(*args, **{"silence_dtype_warnings": True, **kwargs})

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save as in diffusers, with checksums of the files, which loading verifies."""
        super().save_pretrained(save_directory, **kwargs)
        write_checksums(save_directory, ("model_index.json", "scheduler/scheduler_config.json"))

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str:
        """Download and verify the configs and safetensors of a repository; return the snapshot folder in the cache."""
        options = {k: v for k, v in kwargs.items() if k in DOWNLOAD_OPTIONS and v is not None}
        return str(diffdiscover3d.fetch_snapshot(str(pretrained_model_name), **options))

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        """Load `model_index.json`, update old module paths and reject components of unexpected classes."""
        found = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = found[0] if isinstance(found, tuple) else found
        for name, value in index.items():
            if name.startswith("_"):
                continue
            library, kind = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
            if str(library).startswith(f"{LIBRARY}."):
                library = LIBRARY  # early versions recorded the module path
            if not _is_component(name, library, kind):
                expected = _COMPONENTS.get(name, "no such entry")
                raise ModelError(
                    f"{pretrained_model_name_or_path}: model_index.json has {value!r} for {name!r}, expected "
                    f"{expected}; it was written for another pipeline."
                )
            index[name] = [library, kind]
        if not isinstance(index.get("_class_name"), str):
            raise ModelError(f"model_index.json has the class {index.get('_class_name')!r}, expected a class name.")
        return found


def _is_component(name: str, library: object, kind: object) -> bool:
    """Whether a class may be the component `name` of a pipeline; of diffusers, only schedulers."""
    if not isinstance(kind, str):
        return False
    if name == "unet":
        return (library, kind) == (LIBRARY, "UNet3DModel")
    return name == "scheduler" and library == "diffusers" and _is_scheduler(getattr(diffusers, kind, None))


def _is_scheduler(found: object) -> bool:
    """Whether this is a scheduler class; diffusers has other classes in place of those whose libraries are missing."""
    return isinstance(found, type) and issubclass(found, SchedulerMixin)


def _check_scheduler(folder: Path) -> None:
    """Reject unknown scheduler options, about which diffusers only warns, because they could change the results."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return  # diffusers raises an error for the missing file
    config = read_config(path)
    found = getattr(diffusers, str(config.get("_class_name")), None)
    if not _is_scheduler(found):
        raise ModelError(f"{path}: is of class {config.get('_class_name')!r}, expected a scheduler of diffusers.")
    # a converted scheduler keeps the options of the original
    classes = [DDPMScheduler, DDIMScheduler, found, *filter(_is_scheduler, found._get_compatibles())]
    known = set().union(*(c._get_init_keys(c) for c in classes))
    unknown = sorted(k for k in config if not k.startswith("_") and k not in known)
    if unknown:
        raise ModelError(f"{path}: has unknown keys {unknown}; remove them, or upgrade diffusers.")
