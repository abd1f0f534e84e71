"""Users without an entry in the system's list, without a home folder, and settings of notebooks."""

import getpass
import os
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffdiscover3d.utils import environment
from diffdiscover3d.utils.environment import complete_user, prepare_environment

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME")


@pytest.fixture
def unlisted(monkeypatch, tmp_path):
    """A user whom the system does not list, without variables; temporary files are in a folder of the test."""

    def absent(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(environment, "pwd", SimpleNamespace(getpwuid=absent))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)
    return tmp_path


def test_an_unlisted_user_gets_a_name_and_a_private_home(unlisted):
    complete_user()
    assert getpass.getuser() == f"user-{os.getuid()}"
    home = Path.home()
    assert home.parent == unlisted and stat.S_IMODE(home.stat().st_mode) == 0o700
    del os.environ["HOME"]
    complete_user()
    assert Path(os.environ["HOME"]) == home  # the same one, so that caches are found again


@pytest.mark.parametrize("taken", ["link", "open to all"])
def test_a_home_that_somebody_else_could_write_to_is_not_used(unlisted, taken):
    place, other = unlisted / f"diffdiscover3d-user-{os.getuid()}", unlisted / "other"
    other.mkdir()
    if taken == "link":
        place.symlink_to(other)
    else:
        place.mkdir()
        place.chmod(0o777)
    complete_user()
    home = Path(os.environ["HOME"])
    assert home not in (place, other) and stat.S_IMODE(home.stat().st_mode) == 0o700


def test_what_is_set_is_kept(unlisted, monkeypatch):
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("HOME", "/somewhere")
    complete_user()
    assert getpass.getuser() == "me" and os.environ["HOME"] == "/somewhere" and "LOGNAME" not in os.environ


def test_listed_users_are_left_alone(monkeypatch):
    monkeypatch.setattr(environment, "pwd", SimpleNamespace(getpwuid=lambda user: None))
    monkeypatch.delenv("HOME", raising=False)
    before = dict(os.environ)
    complete_user()
    assert dict(os.environ) == before


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_backend_of_a_notebook_is_not_used(monkeypatch, backend):
    monkeypatch.setenv("MPLBACKEND", backend)
    prepare_environment()
    assert os.environ["MPLBACKEND"] == "agg"
