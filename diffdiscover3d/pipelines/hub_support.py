"""What diffusers needs to load pipelines that hold our UNet, from a folder or from the Hub.

diffusers knows the libraries of its own components only: registering ours makes `model_index.json` say
`["diffdiscover3d", "UNet3DModel"]`, which survives moving source files. `DiffusionPipeline.download` rejects modules
it does not know before it would find that entry, so pipelines here download the whole snapshot instead; it holds
nothing but configs and safetensors.
"""

from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils import logging
from huggingface_hub import snapshot_download

from diffdiscover3d.errors import ModelError

LIBRARY = "diffdiscover3d"
_DATA_FILES = ["*.json", "*.safetensors", "*.md", "*.png"]
_DOWNLOAD_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
_COMPONENTS = {
    "unet": ((LIBRARY, "UNet3DModel"),),
    "scheduler": (("diffusers", "DDPMScheduler"), ("diffusers", "DDIMScheduler")),
}

logger = logging.get_logger(__name__)


def register_library() -> None:
    """Make diffusers import our model classes from the root of this package. Harmless when called again."""
    entry = {"UNet3DModel": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(LIBRARY, entry)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(entry)


class HubPipelineMixin:
    """Put before `DiffusionPipeline`: loads by Hub id, data only."""

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str:
        """Fetch the configs and safetensors of a repository into the cache; return the snapshot's folder."""
        options = {k: v for k, v in kwargs.items() if k in _DOWNLOAD_OPTIONS and v is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=_DATA_FILES, **options)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """The entries of `model_index.json`, none but those a pipeline of this package writes.

        Raises:
            ModelError: if it names another component or class: it would be imported.
        """
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in index.items():
            if not name.startswith("_") and tuple(value if isinstance(value, list) else ()) not in _COMPONENTS.get(
                name, ()
            ):
                raise ModelError(
                    f"model_index.json has the entry {name!r}: {value!r}, which is none of this package's pipelines; "
                    "nothing of it was loaded."
                )
        if not isinstance(index.get("_class_name"), str):
            raise ModelError(f"model_index.json has the class {index.get('_class_name')!r}, which must be a name.")
        return loaded
