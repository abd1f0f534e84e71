"""A function is called once, after the execution of the module."""

import importlib
import sys

import pytest

from diffdiscover3d.utils.import_hooks import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "hooked_package").mkdir()
    (tmp_path / "hooked_package" / "__init__.py").write_text("")
    (tmp_path / "hooked_package" / "inner.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "hooked_package.inner"
    for name in [name for name in sys.modules if name.startswith("hooked_package")]:
        del sys.modules[name]


def test_called_once_after_the_import(package):
    before, seen = list(sys.meta_path), []
    after_import(package, lambda: seen.append(sys.modules[package].value))
    importlib.import_module("hooked_package")
    assert seen == []
    module = importlib.import_module(package)
    assert seen == [3] and module.value == 3 and module.__spec__.origin.endswith("inner.py")
    importlib.import_module(package)
    assert seen == [3] and sys.meta_path == before
    after_import(package, lambda: seen.append("again"))
    assert seen == [3, "again"]


def test_a_module_that_does_not_exist(package):
    before = list(sys.meta_path)
    after_import("hooked_package.absent", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked_package.absent")
    assert sys.meta_path == before
