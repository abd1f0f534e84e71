"""Call a function once a module is imported, without importing it.

`wrapt.when_imported` does the same; importing wrapt takes about as long as the help of the command line.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def after_import(name: str, function: Callable[[], None]) -> None:
    """Call a function after a module has been imported for the first time; at once if that has happened.

    Args:
        name: full name of the module.
        function: an exception of it is an exception of the import.

    Example:
        >>> after_import("sys", lambda: print("imported"))
        imported
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and adds a call after its execution."""

    def __init__(self, name: str, function: Callable[[], None]):
        self.name, self.function = name, function

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                self.function()

            spec.loader.exec_module = exec_module
        return spec
