"""Mixins for strict loading, where missing or unknown weights are errors, and for pushing to the Hub.

They call the lazily imported public functions `fetch_snapshot` and `push_folder`, so models depend neither on the Hub
client nor on model cards.
"""

import os
import tempfile

import torch

import diffdiscover3d
from diffdiscover3d.errors import ModelError

DOWNLOAD_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")


def cast_weights(model: torch.nn.Module, dtype: str) -> None:
    """Cast all floating-point weights to a dtype given by name, before saving."""
    torch.nn.Module.to(model, getattr(torch, dtype))  # diffusers' `to` warns about modules kept in float32


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
            pretrained_model_name_or_path: a folder or a Hub id `user/name`.
            revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.

        Raises:
            ModelError: if weights are missing, unexpected or of a wrong shape, or the configuration has unknown keys.
            NetworkError: if the repository cannot be downloaded completely.
        """
        if not os.path.isdir(pretrained_model_name_or_path):
            options = {k: kwargs.pop(k) for k in DOWNLOAD_OPTIONS if k in kwargs}
            pretrained_model_name_or_path = diffdiscover3d.fetch_snapshot(str(pretrained_model_name_or_path), **options)
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
        return (model, info) if return_info else model

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
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
