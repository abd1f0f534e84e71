"""The commands that share models."""

from pathlib import Path
from typing import Annotated

import typer

from diffdiscover3d.utils.terminal import say

RepoId = Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")]


def push(
    folder: Annotated[Path, typer.Argument(help="A trained model's folder.")],
    repo_id: RepoId,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="The commit's first line.")] = None,
    with_pictures: Annotated[
        bool, typer.Option("--with-pictures", help="Also upload the preview, which shows training volumes.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Upload a model with its card as one commit. Log in with `hf auth login`, or set HF_TOKEN."""
    from diffdiscover3d.hub.registry import push as run

    _show_progress(not quiet)
    say(
        run(
            folder,
            repo_id,
            revision=revision,
            private=private or None,
            create_pr=create_pr,
            commit_message=commit_message,
            with_pictures=with_pictures,
        )
    )


def pull(
    repo_id: RepoId,
    folder: Annotated[Path | None, typer.Argument(help="Folder to copy it to (default: only the cache).")] = None,
    revision: Revision = None,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Use the cache, not the network.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Download a model, verify every file, and print its folder."""
    from diffdiscover3d.hub.registry import pull as run

    _show_progress(not quiet)
    say(run(repo_id, folder, revision=revision, local_files_only=local_files_only, overwrite=overwrite))


def _show_progress(wanted: bool) -> None:
    import sys

    from huggingface_hub.utils import disable_progress_bars

    if not wanted or not sys.stderr.isatty():
        disable_progress_bars()
