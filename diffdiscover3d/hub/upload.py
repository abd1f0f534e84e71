"""Push a model folder to the Hub in one commit: a fixed list of files, a card and a picture.

Other files in the folder, such as segmentations, pictures of patients or notes, are never uploaded.
"""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.errors import ModelError, NetworkError, first_line
from diffdiscover3d.hub.cards import CARD_NAME, DATASETS, PICTURE_NAME, SCORES_NAME, SYNTHETIC, folder_kind, write_card
from diffdiscover3d.hub.download import MODEL_FILES, is_model_file, is_repo_id
from diffdiscover3d.models.embedded import embedded_card
from diffdiscover3d.utils.checksums import update_checksums
from diffdiscover3d.utils.files import read_model_json

logger = logging.getLogger("diffdiscover3d")
_MODEL_ENTRIES = ("_name_or_path", "teacher", "init_from", "parent", "model")  # they may hold Hub ids
_PATH_ENTRIES = (*_MODEL_ENTRIES, "dataset", "output_dir", "resume")
_FILE_ENTRIES = ("series", "include")  # a DICOM UID and patterns of names, which may identify a patient
_OWN_SCANS = "own-scans"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    scores: dict | None = None,
    with_pictures: bool = False,
) -> str:
    """Upload a model folder with a rendered model card, as one commit.

    Args:
        folder: as the trainings write it. The card shows `scores.json` (written by `evaluate --output`); a README.md
            in the folder is kept as the card, and the weights of an embedded model keep its card. Only the files in
            `MODEL_FILES` are uploaded, without the local paths in configs and options; checkpoints, previews, logs and
            other files are not. Files in `MODEL_FILES` that the repository has and this folder has not are deleted
            from it.
        repo_id: `user/name`; created if it does not exist.
        revision: branch to push to, created if it does not exist; default: main.
        private: visibility of a repository that is created.
        create_pr: open a pull request instead of committing.
        token: default: that of `hf auth login` or of the environment.
        with_pictures: also upload `preview.png` or the newest preview of the training. They show slices of the
            training volumes, so by default only those of synthetic cells are uploaded.
        scores: as `evaluate` returned them for these weights; replaces `scores.json` of the folder.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ModelError: if the folder holds no model, the id is invalid, or the scores are of other weights.
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
        if scores is not None:
            (staged / SCORES_NAME).write_text(json.dumps(scores, indent=2), encoding="utf-8")
        _hide_paths(staged)
        update_checksums(staged)
        if with_pictures or _is_synthetic(folder):
            _add_picture(folder, staged)
        else:
            (staged / PICTURE_NAME).unlink(missing_ok=True)
        card = embedded_card(staged)
        if card is not None and not (staged / CARD_NAME).exists():  # it names whose scans the model was trained on
            shutil.copyfile(card, staged / CARD_NAME)
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
                # shards, an index or scores of an earlier model must not remain
                delete_patterns=list(MODEL_FILES),
            )
        except Exception as error:  # the Hub's client and its HTTP library raise many kinds
            raise NetworkError(
                f"{repo_id}: the push failed: {first_line(error)} "
                "(`hf auth login` logs in; you must be allowed to write)"
            ) from error
    return str(commit.pr_url or commit.commit_url)


def _files_to_push(folder: Path) -> Iterator[Path]:
    """The model files of a folder; links that lead out of it are not followed."""
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":  # of the Hub's cache, whose files link to its blobs
        roots.append(folder.parent.parent.resolve() / "blobs")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_model_file(path.relative_to(folder).as_posix()):
            target = path.resolve()
            if any(target.is_relative_to(root) for root in roots):
                yield path
            else:
                logger.warning("%s is not uploaded: it links to a file outside the folder", path)


def _is_synthetic(folder: Path) -> bool:
    """Whether the model was trained on generated volumes alone, of which pictures may be published."""
    options = folder / "train_config.json"
    return options.is_file() and read_model_json(options).get("dataset") in SYNTHETIC


def _hide_paths(staged: Path) -> None:
    """Shorten local paths in JSON files to their last component, and remove which files of a folder were chosen."""
    for path in staged.rglob("*.json"):
        content = path.read_bytes()
        if any(f'"{name}"'.encode() in content for name in (*_PATH_ENTRIES, *_FILE_ENTRIES)):
            path.write_text(json.dumps(_without_paths(read_model_json(path)), indent=2) + "\n", encoding="utf-8")


def _without_paths(value, name: str = ""):
    """A JSON value with shortened paths at every depth; `name` is the key of the value."""
    if isinstance(value, dict):
        return {key: None if key in _FILE_ENTRIES else _without_paths(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner, name) for inner in value]
    if not isinstance(value, str) or name not in _PATH_ENTRIES:
        return value
    public = value in DATASETS or value.startswith("hf://") if name == "dataset" else False
    # a Hub id looks like a relative path of two components
    public = public or (name in _MODEL_ENTRIES and is_repo_id(value) and not Path(value).exists())
    if public:
        return value
    shown = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    # a folder that is called like a published dataset is not it
    return _OWN_SCANS if name == "dataset" and shown in DATASETS else shown


def _add_picture(folder: Path, staged: Path) -> None:
    """Add the newest preview of the training, unless the folder has a picture already."""
    pictures = sorted((folder / "previews").glob("*.png"))
    if pictures and not (staged / PICTURE_NAME).exists():
        shutil.copyfile(pictures[-1], staged / PICTURE_NAME)
