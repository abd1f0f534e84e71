"""Atomic writing of files and folders."""

import hashlib
import json
import os
import stat

import pytest
from safetensors import SafetensorError

from diffdiscover3d.errors import InputError, NetworkError, OutputError
from diffdiscover3d.utils.files import atomic_file, atomic_folder, sha256, write_json
from diffdiscover3d.utils.staging import staged_folder


def content(folder) -> dict[str, bytes | None]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def umask():
    """Set the umask during a test and restore it."""
    old = os.umask(0)
    os.umask(old)
    yield os.umask
    os.umask(old)


def test_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "a.bin"
    with atomic_file(target, suffix=".nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        assert temporary.parent.parent == target.parent  # on the same disk
        assert temporary.parent.name.startswith(".")  # hidden, so that it is not listed as a scan
        temporary.write_bytes(b"half")
        assert not target.exists()
        temporary.write_bytes(b"whole")
    assert content(tmp_path / "new") == {"a.bin": b"whole"}


def test_file_replaces_in_one_step(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with open(target, "rb") as reader:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"new")
            assert target.read_bytes() == b"old"
        assert reader.read() == b"old"  # open handles keep the complete old file
    assert content(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError, NetworkError])
def test_file_error_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(error, match=r"^stop$"), atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        raise error("stop")
    assert content(tmp_path) == {"a.bin": b"old"}


def test_disk_full_is_an_output_error(tmp_path):
    target = tmp_path / "a.bin"
    message = r"a\.bin: cannot be written \(No space left.*free some space"
    with pytest.raises(OutputError, match=message), atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert content(tmp_path) == {}


def test_unwritable_places_are_output_errors(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for target in (tmp_path / "file" / "a.bin", tmp_path / "file" / "b" / "a.bin", tmp_path / "folder"):
        with pytest.raises(OutputError, match=r"cannot be written.*choose another folder"), atomic_file(target) as t:
            t.write_bytes(b"x")
    for target in (tmp_path / "file" / "a", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written"), atomic_folder(target) as t:
            (t / "x").write_bytes(b"x")
    assert content(tmp_path) == {"file": b"x", "folder": None, "folder/full": None}


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_bytes(b"w")
        (temporary / "config").write_bytes(b"c")
        assert not target.exists()
    assert content(tmp_path / "new") == {
        "model": None,
        "model/sub": None,
        "model/sub/weights": b"w",
        "model/config": b"c",
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputError, NetworkError])
def test_folder_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error, match=r"^stop$"), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "half").write_bytes(b"h")
        raise error("stop")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask, mask):
    umask(mask)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"x")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").write_bytes(b"x")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"file": 0o666 & ~mask, "folder": 0o777 & ~mask, "inner": 0o666 & ~mask}
    assert umask(mask) == mask  # reading the umask did not change it


def test_write_json(tmp_path):
    value = {"Größe": [1, 2.5, None], "b": "é"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "Größe" in text and text.endswith("}\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert content(tmp_path) == {"a.json": text.encode()}


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# staged folders


def test_staged_files_appear_together(tmp_path):
    target = tmp_path / "new" / "out"
    with staged_folder(target) as folder:
        (folder / "a").write_bytes(b"a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"b")
        assert [p for p in target.iterdir() if not p.name.startswith(".")] == []
    assert content(target) == {"a": b"a", "sub": None, "sub/b": b"b"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputError, NetworkError])
def test_staged_files_vanish_on_an_error(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"old")
    for target in (tmp_path / "out", tmp_path / "new" / "deep"):
        with pytest.raises(error, match=r"^stop$"), staged_folder(target) as folder:
            (folder / "a").write_bytes(b"new")
            (folder / "b").write_bytes(b"new")
            raise error("stop")
    assert content(tmp_path) == {"out": None, "out/a": b"old"}


def test_staging_replaces_its_own_files_only(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "kept", "sub/b", "sub/kept"):
        (tmp_path / name).write_bytes(b"old")
    with staged_folder(tmp_path) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_bytes(b"new")
    assert content(tmp_path) == {"a": b"new", "kept": b"old", "sub": None, "sub/b": b"new", "sub/kept": b"old"}


def test_a_mixture_of_two_models_has_no_index(tmp_path, monkeypatch):
    """If killed while files are moved, the folder contains the old model, the new model or no model."""

    def write(folder, text):
        (folder / "unet").mkdir()
        for name in ("model_index.json", "unet/config.json", "unet/weights.safetensors"):
            (folder / name).write_text(text)

    write(tmp_path, "old")
    seen, replace = [], os.replace

    def watched(source, target):
        seen.append({k: v for k, v in content(tmp_path).items() if v is not None and not k.startswith(".")})
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with staged_folder(tmp_path) as folder:
        write(folder, "new")
    monkeypatch.undo()
    mixed = [state for state in seen if len(set(state.values())) > 1]
    assert mixed and not any("model_index.json" in state for state in mixed)
    assert {v for v in content(tmp_path).values() if v is not None} == {b"new"}


def test_a_folder_in_the_way_of_a_staged_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"b: is a folder.*choose another"), staged_folder(tmp_path) as folder:
        (folder / "a").write_bytes(b"new")
        (folder / "b").write_bytes(b"new")
    assert content(tmp_path) == {"a": b"old", "b": None}


def test_staging_in_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match="cannot be written"), staged_folder(target):
            pass
    assert content(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder, staged_folder])
def test_what_safetensors_makes_of_a_full_disk(tmp_path, writer):
    """SafetensorError is not an OSError."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    message = r"model: cannot be written.*No space left.*free some space"
    with pytest.raises(OutputError, match=message), writer(tmp_path / "model"):
        raise error
    assert content(tmp_path) == {}
