"""Handles of locked files, which forked children close."""

import contextlib
import os

_HELD: set[int] = set()


def hold(handle: int | None) -> None:
    """Close a handle in forked children: one that outlives this process, such as a data-loading worker, keeps locks."""
    if handle is not None:
        _HELD.add(handle)


def release(handle: int | None) -> None:
    """Close a handle, and thereby release its lock."""
    if handle is not None:
        _HELD.discard(handle)
        os.close(handle)


def _close_in_child() -> None:
    for handle in _HELD:
        with contextlib.suppress(OSError):
            os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
