"""Surroundings of a command: users without an entry in the system's list, no home folder, settings of notebooks."""

import os
import stat
import tempfile
from pathlib import Path

try:
    import pwd
except ImportError:  # Windows
    pwd = None

_USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # read by `getpass.getuser`


def prepare_environment() -> None:
    """Prepare the environment of a command, once, when it starts.

    Pictures are drawn without a display, whatever backend a notebook has set for its children.
    """
    os.environ["MPLBACKEND"] = "agg"
    complete_user()


def complete_user() -> None:
    """Set a user name and a home folder for a user without an entry in the system's list.

    `docker run --user 12345` starts such a process. Libraries that ask for the name of the user would fail at their
    import, and those that ask for the home folder would create one called `~` in the current folder.
    """
    if pwd is None or _is_listed(os.getuid()):
        return
    if not any(os.environ.get(name) for name in _USER_NAMES):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    if not os.environ.get("HOME"):
        os.environ["HOME"] = str(_private_folder())


def _is_listed(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _private_folder() -> Path:
    """A folder for temporary files of this user alone; the same one every time, unless somebody else has it."""
    folder = Path(tempfile.gettempdir()) / f"diffdiscover3d-user-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="diffdiscover3d-"))
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if own else Path(tempfile.mkdtemp(prefix="diffdiscover3d-"))
