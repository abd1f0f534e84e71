"""Push a model folder to the Hub in one commit: configs, safetensors, card and picture, nothing else."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.cards import CARD_NAME, PICTURE_NAME, SCORES_NAME, folder_kind, write_card
from diffdiscover3d.errors import ModelError, NetworkError
from diffdiscover3d.hub_files import is_repo_id, read_json

_SKIPPED_FOLDERS = ("checkpoints", "previews")
_PATH_ENTRIES = ("_name_or_path", "dataset", "teacher", "init_from", "parent", "model")
_WEIGHTS = ("diffusion_pytorch_model*", "unet/diffusion_pytorch_model*")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a model folder, with a model card rendered from what lies in it, as one commit.

    Args:
        folder: as the trainings write it. `scores.json` (written by `evaluate --output`) goes into the card;
            a README.md in the folder is kept as the card; checkpoints, previews and logs stay at home, and so do
            the paths in configs and options.
        repo_id: `user/name`; made if it does not exist.
        revision: branch to push to, made if it does not exist; default: main.
        private: of a repository that is made.
        create_pr: open a pull request instead of committing.
        token: default: that of `hf auth login` or of the environment.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ModelError: if the folder holds no model, the id is no proper one, or the scores are of other weights.
        NetworkError: if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    folder = Path(folder)
    kind = folder_kind(folder)
    if not is_repo_id(repo_id):
        raise ModelError(f"{repo_id!r}: no Hub id; it must look like user/name.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        for path in _files_to_push(folder):
            target = staged / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        _hide_paths(staged)
        _add_picture(folder, staged)
        if not (staged / CARD_NAME).exists():
            write_card(staged, repo_id)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                try:
                    api.repo_info(repo_id, revision=revision)
                except RevisionNotFoundError:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                commit_message=commit_message or f"Upload {kind} model with diffdiscover3d",
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(_WEIGHTS),  # shards of an earlier, larger model must not stay beside the new ones
            )
        except Exception as error:  # the Hub's client and its HTTP library raise many kinds
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise NetworkError(
                f"{repo_id}: the push failed: {reason} (`hf auth login` logs in; you must be allowed to write)"
            ) from error
    return str(commit.pr_url or commit.commit_url)


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
            if scores is not None:
                (Path(folder) / SCORES_NAME).write_text(json.dumps(scores, indent=2), encoding="utf-8")
            return push_folder(
                folder,
                repo_id,
                revision=revision,
                private=private,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
            )


def _files_to_push(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if not path.is_file() or inside[0] in _SKIPPED_FOLDERS or any(part.startswith(".") for part in inside):
            continue
        if path.suffix in (".json", ".safetensors", ".png") or path.name == CARD_NAME:
            yield path


def _hide_paths(staged: Path) -> None:
    """Where data and models lay says who trained; only the last name of a path is published."""
    for path in staged.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        if not any(f'"{name}"' in text for name in _PATH_ENTRIES):
            continue
        options = read_json(path)
        for name in _PATH_ENTRIES:
            value = options.get(name)
            if isinstance(value, str) and not is_repo_id(value):
                options[name] = Path(value).name
        path.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def _add_picture(folder: Path, staged: Path) -> None:
    """The newest preview of the training, unless there is a picture already."""
    pictures = sorted((folder / "previews").glob("*.png"))
    if pictures and not (staged / PICTURE_NAME).exists():
        shutil.copyfile(pictures[-1], staged / PICTURE_NAME)
