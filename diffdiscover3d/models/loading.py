"""Mixins for strict loading, where missing or unknown weights are errors, and for pushing to the Hub.

They call the lazily imported public functions `fetch_snapshot` and `push_folder`, so models depend neither on the Hub
client nor on model cards.
"""

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import diffdiscover3d
from diffdiscover3d.errors import ModelError
from diffdiscover3d.models.config_schema import read_config
from diffdiscover3d.models.embedded import embedded_folder
from diffdiscover3d.utils.checksums import verify_checksums, write_checksums
from diffdiscover3d.utils.files import set_permissions

CONFIG_NAME = "config.json"
_CHECKED_FILES = (CONFIG_NAME, "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")
_WEIGHTS = "diffusion_pytorch_model*.safetensors"
_EMBEDDED = {"UNet3DModel": "unet", "StructureDiscoveryModel": "discovery"}  # kinds of [`embedded_folder`]
_FLOATS = ("F64", "F32", "F16", "BF16")
_LARGEST_WEIGHT = 1e6
DOWNLOAD_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")


def cast_weights(model: torch.nn.Module, dtype: str) -> None:
    """Cast all floating-point weights to a dtype given by name, before saving."""
    torch.nn.Module.to(model, getattr(torch, dtype))


def check_weights(model: torch.nn.Module, source: str | Path) -> None:
    """Refuse weights that no training of this package writes.

    Raises:
        ModelError: if a weight is not finite or beyond 1e6 in magnitude, or `part_order` is no permutation.
    """
    for name, tensor in model.state_dict().items():
        if name.rsplit(".", 1)[-1] == "part_order":
            if sorted(tensor.tolist()) != list(range(len(tensor))):
                raise ModelError(f"{source}: `{name}` must be a permutation of 0..{len(tensor) - 1}; fetch it again.")
        elif tensor.is_floating_point():
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not largest <= _LARGEST_WEIGHT:  # also if it is NaN
                raise ModelError(
                    f"{source}: the weight {name!r} must be finite and at most {_LARGEST_WEIGHT:.0e} in magnitude, got "
                    f"{largest:g}; the file is damaged or the training diverged."
                )


def check_stored_types(folder: str | Path) -> None:
    """Refuse safetensors files whose weights are stored as integers or booleans; reads the headers alone.

    Raises:
        ModelError: naming the weight and its type.
    """
    for path in sorted(Path(folder).glob(_WEIGHTS)):
        try:
            with safe_open(path, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{path}: cannot be read as safetensors ({error}); fetch the model again.") from error
        for name, dtype in types.items():
            counts = name.rsplit(".", 1)[-1] in ("part_order", "num_batches_tracked")
            if (dtype not in _FLOATS) != counts or (counts and dtype != "I64"):
                raise ModelError(f"{path}: {name!r} is stored as {dtype}; weights are {', '.join(_FLOATS)}.")


class PushMixin:
    """Adds a `push_to_hub` that uploads the weights and a model card in one commit."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        max_shard_size: str | int = "10GB",
        scores: dict | None = None,
    ) -> str:
        """Save the model, render its card and upload both; see [`push_folder`].

        Args:
            max_shard_size: weights are split into safetensors files of at most this size.
            scores: the result of `evaluate` for these weights.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
            return diffdiscover3d.push_folder(
                folder,
                repo_id,
                revision=revision,
                private=private,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
                scores=scores,
            )


class StrictLoadingMixin(PushMixin):
    """Adds strict `from_pretrained` and `from_config`, and `push_to_hub`; must precede `ModelMixin` in the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a model as in diffusers, from safetensors files only; files from the Hub are verified.

        Args:
            pretrained_model_name_or_path: the name of an embedded model (a folder of that name is `./name`), a folder,
                or a Hub id `user/name`.
            dtype: type of the weights; default: float32, also for files stored in half precision.
            revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.

        Raises:
            ModelError: if weights are missing, unexpected or of a wrong shape, or the configuration has unknown keys.
            NetworkError: if the repository cannot be downloaded completely.
        """
        embedded = embedded_folder(pretrained_model_name_or_path, _EMBEDDED[cls.__name__])
        if embedded is not None:
            pretrained_model_name_or_path = embedded
            kwargs.pop("subfolder", None)  # "unet", as of other pipelines
        elif not os.path.isdir(pretrained_model_name_or_path):
            options = {k: kwargs.pop(k) for k in DOWNLOAD_OPTIONS if k in kwargs}
            pretrained_model_name_or_path = diffdiscover3d.fetch_snapshot(str(pretrained_model_name_or_path), **options)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if (folder / CONFIG_NAME).is_file():  # diffusers reports a missing file
            read_config(folder / CONFIG_NAME, cls.__name__)
        check_stored_types(folder)
        kwargs["use_safetensors"] = True  # other formats are pickles
        return_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("torch_dtype", torch.float32)  # also for files stored in half precision
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        problems = {kind: keys for kind, keys in info.items() if keys and kind != "error_msgs"}
        if problems or info.get("error_msgs"):
            details = "; ".join(f"{kind}: {sorted(map(str, keys))[:3]}" for kind, keys in problems.items())
            raise ModelError(
                f"the weights in {str(pretrained_model_name_or_path)!r} do not match {cls.__name__} ({details}); "
                "they were written by another version or are damaged."
            )
        verify_checksums(folder)  # after the checks that name a faulty entry or weight
        check_weights(model, folder)
        return (model, info) if return_info else model

    def to(self, *args, **kwargs):
        """Move or cast as in diffusers, without its warning about modules kept in float32: there are none."""
        dtype = kwargs.pop("dtype", None) or next((a for a in args if isinstance(a, torch.dtype)), None)
        if dtype is not None:
            torch.nn.Module.to(self, dtype)
        rest = [a for a in args if not isinstance(a, torch.dtype)]
        return super().to(*rest, **kwargs) if rest or kwargs else self

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save configuration and weights as in diffusers, and their checksums, which loading verifies."""
        super().save_pretrained(save_directory, **kwargs)
        set_permissions(Path(save_directory).glob("*.safetensors"))
        write_checksums(save_directory, _CHECKED_FILES)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """Build a model from a configuration; unlike in the base class, an unknown key is an error."""
        known = cls._get_init_keys(cls) - {"self"}
        unknown = sorted(k for k in (config or {}) if not k.startswith("_") and k not in known)
        if unknown:
            raise ModelError(
                f"the configuration of {cls.__name__} has unknown keys {unknown}; "
                "it was written for another class or by a newer version of this package."
            )
        try:
            return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        except (TypeError, ValueError) as error:  # TypeError: unknown keys of a nested configuration
            raise ModelError(f"the configuration of {cls.__name__} is not valid: {error}") from error
