"""The map of the code names files and functions that exist."""

import ast
import re
from pathlib import Path

import diffdiscover3d

ROOT = Path(diffdiscover3d.__file__).parent
PAGE = ROOT.parent / "docs" / "concepts" / "map-of-the-code.md"
PATH = r"`([\w/]+\.py|[\w/]+/)`"
NAMES = r": ((?:`[\w.]+`(?:, )?)+)"


def rows() -> list[str]:
    """The second cells of the tables."""
    return re.findall(r"^\| .* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)


def defines(node: ast.AST, name: str) -> bool:
    """Whether a module or class defines a function, a class or, with a dot, a method."""
    first, _, rest = name.partition(".")
    found = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == first]
    return bool(found) and (not rest or defines(found[0], rest))


def test_paths_and_names_exist():
    found, names = set(), []
    for row in rows():
        folder = ROOT
        for match in re.finditer(f"{PATH}(?:{NAMES})?", row):
            # a file without a folder is in that of the file before it
            path = next((p for p in (folder / match[1], ROOT / match[1]) if p.exists()), None)
            assert path is not None, f"{match[1]} in: {row}"
            folder = path if path.is_dir() else path.parent
            found.add(path)
            for name in re.findall(r"`([\w.]+)`", match[2] or "") if path.is_file() else ():
                assert defines(ast.parse(path.read_text(encoding="utf-8")), name), f"{name} in: {row}"
                names.append(name)
    assert len(found) > 40 and {"make_scheduler", "region_consistency", "DiscoveryTraining.losses"} <= set(names)


def test_every_subpackage_is_on_the_map():
    text = PAGE.read_text(encoding="utf-8")
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert not {name for name in folders if f"{name}/" not in text}


def test_the_order_of_imports_is_that_of_the_layers():
    from tests.test_layers import WINGS

    chain = re.search(r"imports only from those after it: (.*?)\.", PAGE.read_text(encoding="utf-8"), flags=re.S)[1]
    assert re.findall(r"`(\w+)`", chain) == WINGS[::-1]
