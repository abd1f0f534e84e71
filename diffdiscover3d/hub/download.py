"""Download the files of a model repository and verify them; nothing in them is executed.

The Hub lists each file with the sha256 of its content (large files) or its git hash (small ones). A download is
complete only if every listed file exists and has its hash.
"""

import fnmatch
import hashlib
import re
import time
from pathlib import Path, PurePosixPath

from diffdiscover3d.errors import ModelError, NetworkError, first_line
from diffdiscover3d.utils.files import sha256

DATA_FILES = ("*.json", "*.safetensors", "*.md", "*.png")  # the files of a model; no others are fetched
_WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json")
# files of a model folder that are published, by their paths in it
MODEL_FILES = (
    "model_index.json",
    "config.json",
    "checksums.json",
    "unet/config.json",
    "unet/checksums.json",
    "scheduler/scheduler_config.json",
    *_WEIGHTS,
    *(f"unet/{pattern}" for pattern in _WEIGHTS),
    "working_grid.json",
    "domain.json",
    "train_config.json",
    "scores.json",
    "selection.json",
    "split.json",
    "preview.png",
    "README.md",
)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, `user/name`."""
    return bool(REPO_ID.fullmatch(name)) and ".." not in name and "--" not in name


def is_model_file(name: str) -> bool:
    """Whether a path within a model folder, with forward slashes, is published."""
    return any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in MODEL_FILES)


def is_data_file(name: str) -> bool:
    """Whether a path within a repository, with forward slashes, is fetched."""
    return any(PurePosixPath(name).match(pattern) for pattern in DATA_FILES)


def fetch_snapshot(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Download the configs, weights, card and pictures of a model repository into the Hub's cache.

    Args:
        repo_id: `user/name`.
        revision: branch, tag, pull request (`refs/pr/1`) or commit; default: main.
        cache_dir, token, local_files_only, force_download: as in huggingface_hub; a token normally comes from
            `hf auth login` or the environment. Without a network, a complete snapshot in the cache is used.

    Returns:
        The snapshot's folder, every file verified.

    Raises:
        NetworkError: if the repository does not exist or cannot be reached, or a file arrives damaged twice.
        ModelError: if the id or a file name in the repository is invalid.
    """
    from huggingface_hub import snapshot_download

    if not is_repo_id(repo_id):
        raise ModelError(f"{repo_id!r}: no Hub id; it must look like user/name.")
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    damaged: list[str] = []
    for attempt in (1, 2):
        try:
            folder = Path(
                snapshot_download(
                    repo_id, allow_patterns=list(DATA_FILES), force_download=force_download and attempt == 1, **options
                )
            )
        except Exception as error:  # the Hub's client and its HTTP library raise many kinds
            if attempt == 1 and getattr(getattr(error, "response", None), "status_code", 0) >= 500:
                time.sleep(1)  # the client retries broken connections, but not server errors
                continue
            raise _network_error(repo_id, revision, error) from error
        listing = None if local_files_only else _list_files(repo_id, folder.name, token)
        damaged = _find_damage(repo_id, folder, listing)
        if not damaged:
            return folder
        # a damaged file in the cache would be used the next time
        for name in damaged:
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        if local_files_only:
            break
    raise NetworkError(
        f"{repo_id}: {', '.join(damaged[:3])} did not arrive as the repository lists it (size or hash); "
        "try again later, or tell the repository's owner."
    )


def file_hash(path: str | Path, kind: str) -> str:
    """The `"sha256"` of a file's content, or its `"git"` blob hash."""
    if kind == "sha256":
        return sha256(path)
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _list_files(repo_id: str, commit: str, token) -> dict[str, tuple[str, str]] | None:
    """Hash of each file at a commit, as (kind, value); `None` if the Hub is unreachable or offline mode is on."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        entries = list(HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=commit))
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:  # the Hub refused the request
            raise _network_error(repo_id, commit, error) from error
        return None
    except (OSError, OfflineModeIsEnabled):
        return None
    except Exception as error:
        if type(error).__module__.startswith("httpx"):
            return None
        raise
    files = [e for e in entries if hasattr(e, "blob_id")]
    return {e.path: ("sha256", e.lfs.sha256) if e.lfs else ("git", e.blob_id) for e in files}


def _find_damage(repo_id: str, folder: Path, listing: dict[str, tuple[str, str]] | None) -> list[str]:
    """Names of the files that are missing or differ from the repository's listing.

    `HfApi.verify_repo_checksums` is no substitute: it needs a connection, compares files that were never fetched, and
    takes names that lead out of the folder.

    Args:
        listing: hashes by name; `None` to compare with the hashes by which the cache names its files.

    Raises:
        ModelError: if a name would lie outside the folder.
    """
    if listing is None:
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not _fits_its_name(p)]
    damaged = []
    for name, (kind, expected) in listing.items():
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name:
            raise ModelError(f"{repo_id}: holds a file called {name!r}, which would lie outside its folder; refused.")
        if not is_data_file(name):
            continue
        path = folder / name
        if not path.is_file() or file_hash(path, kind) != expected:
            damaged.append(name)
    return damaged


def _fits_its_name(path: Path) -> bool:
    """Whether a cached file matches its name: the cache names each file by its hash."""
    name = path.resolve().name
    if _SHA256.fullmatch(name):
        return file_hash(path, "sha256") == name
    return not _SHA1.fullmatch(name) or file_hash(path, "git") == name


def _network_error(repo_id: str, revision: str | None, error: Exception) -> NetworkError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        reason = "request access on its page, then `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "no such repository, or a private one: check the id, or log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"has no revision {revision!r}"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        reason = "is not in the local cache and the Hub cannot be reached (or offline mode is on); go online once"
    else:
        reason = f"cannot be fetched from the Hub: {first_line(error)}"
    return NetworkError(f"{repo_id}: {reason}.")
