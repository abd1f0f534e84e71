"""The wheel and the sdist that are published: they hold what the program needs, and run from an empty folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Folder with a wheel and an sdist built from the files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            path.write_bytes((ROOT / name).read_bytes())
    for kind in ("wheel", "sdist"):
        code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True)
    return out


def test_the_wheel_segments_from_an_empty_folder(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import sys, diffdiscover3d; assert diffdiscover3d.__file__.startswith(sys.path[0]), diffdiscover3d.__file__"
    for arguments in (["-c", code], ["-m", "diffdiscover3d", "synthesize", "-n", "1", "-o", "demo"]):
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=_environment(site), check=True)
    scan = "demo/synthetic-regular-test-000.nii.gz"
    command = [sys.executable, "-m", "diffdiscover3d", "segment", scan, "--report", "--tables", "-o", "parts"]
    subprocess.run(command, cwd=tmp_path, env=_environment(site), check=True)
    assert (tmp_path / "parts" / "synthetic-regular-test-000_dseg.nii.gz").stat().st_size > 0
    assert (tmp_path / "parts" / "synthetic-regular-test-000_report.html").stat().st_size > 0


def _environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}


def test_the_sdist_holds_package_and_licence(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "diffdiscover3d").rglob("*") if _is_packaged(p)}
    assert package <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def _is_packaged(path: Path) -> bool:
    return path.is_file() and path.suffix in (".py", ".json", ".safetensors", ".jinja", ".html", ".js", ".gz")
