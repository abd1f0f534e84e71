"""Strict loading: missing or unknown weights are errors. Pushing to the Hub.

The Hub is reached through the public, lazily imported names `fetch_snapshot` and `push_folder` of the package, so that
models import neither the Hub nor model cards.
"""

import os
import tempfile

import torch

import diffdiscover3d
from diffdiscover3d.errors import ModelError

DOWNLOAD_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")


def cast_weights(model: torch.nn.Module, dtype: str) -> None:
    """Turn all floating-point weights into a type given by name, before they are saved."""
    torch.nn.Module.to(model, getattr(torch, dtype))  # diffusers' own `to` warns about modules it would spare


class PushMixin:
    """Gives a model or pipeline `push_to_hub`, as in diffusers, but as one commit and with a card."""

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
        """Save, render the card and upload; see [`push_folder`].

        Args:
            max_shard_size: weights are split into safetensors files of at most this size.
            scores: what `evaluate` returned for these weights.
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
    """Put before `ModelMixin`: strict loading from a folder or a Hub id, pushing with a card."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a folder or a Hub id, as in diffusers; only safetensors, and from the Hub only verified files.

        Args:
            pretrained_model_name_or_path: folder or `user/name`.
            revision, cache_dir, token, local_files_only, force_download: as in huggingface_hub.

        Raises:
            ModelError: if weights are missing, unknown or misshapen, or the configuration has unknown keys.
            NetworkError: if the repository cannot be fetched whole.
        """
        if not os.path.isdir(pretrained_model_name_or_path):
            options = {k: kwargs.pop(k) for k in DOWNLOAD_OPTIONS if k in kwargs}
            pretrained_model_name_or_path = diffdiscover3d.fetch_snapshot(str(pretrained_model_name_or_path), **options)
        kwargs["use_safetensors"] = True  # the other formats are pickles
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("torch_dtype", torch.float32)  # files may be stored in half precision; computing is not
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        problems = {kind: keys for kind, keys in info.items() if keys and kind != "error_msgs"}
        if problems or info.get("error_msgs"):
            details = "; ".join(f"{kind}: {sorted(map(str, keys))[:3]}" for kind, keys in problems.items())
            raise ModelError(
                f"the weights in {str(pretrained_model_name_or_path)!r} do not fit {cls.__name__} ({details}); "
                "they were written by another version or are damaged."
            )
        return (model, info) if wants_info else model

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """Build from a configuration; unlike the base class, an unknown key is an error and not a warning."""
        known = cls._get_init_keys(cls) - {"self"}
        unknown = sorted(k for k in (config or {}) if not k.startswith("_") and k not in known)
        if unknown:
            raise ModelError(
                f"the configuration of {cls.__name__} has unknown keys {unknown}; "
                "it was written for another class or by a newer version of this package."
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
