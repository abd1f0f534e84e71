"""Rebuild the report viewer reproducibly from the pinned npm package: python tools/build_viewer.py

Writes `niivue.js.gz`, the minified bundle of the package, and `LICENSES.txt`, the licences of NiiVue and its bundled
dependencies, into diffdiscover3d/reporting/viewer/. Needs npm. With --check, files are only compared.
"""

import argparse
import gzip
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.69.0"
SHA256 = "6e9a6a471b428eb3b258a0086beca9187d95e43a781a39e8a519c6da246af485"
BUNDLE = "package/dist/niivue.umd.js"
# bundled packages according to dist/metafile-esm.json; their tarballs are downloaded only for the licences
BUNDLED = (
    "gl-matrix@3.4.3",
    "fflate@0.8.2",
    "nifti-reader-js@0.8.0",
    "zarrita@0.5.0",
    "@zarrita/storage@0.1.0",
    "numcodecs@0.3.2",
    "array-equal@1.0.2",
    "@lukeed/uuid@2.0.1",
    "@ungap/structured-clone@1.2.0",
)
TARGET = Path(__file__).parent.parent / "diffdiscover3d" / "reporting" / "viewer"
# the npm package declares BSD-2-Clause without the licence text; copied from LICENSE of github.com/niivue/niivue
NIIVUE_LICENSE = """\
BSD 2-Clause License

Copyright (c) 2021, Niivue
All rights reserved.

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this
   list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice,
   this list of conditions and the following disclaimer in the documentation
   and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE
FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER
CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY,
OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""


def fetch(package: str, folder: Path) -> Path:
    """Download a package's tarball with npm."""
    command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    return folder / name


def license_of(package: str, folder: Path) -> str:
    """The licence text in a package's tarball, or the licence it declares."""
    with tarfile.open(fetch(package, folder)) as archive:
        for member in archive.getmembers():
            if member.isfile() and Path(member.name).name.lower().startswith(("licen", "copying")):
                return archive.extractfile(member).read().decode().strip()
    shown = subprocess.run(["npm", "view", package, "license", "repository.url"], capture_output=True, text=True)
    return shown.stdout.strip()


def build() -> dict[str, bytes]:
    """Build the files; returns their content by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tarball = fetch(f"@niivue/niivue@{VERSION}", folder)
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{tarball.name}: its sha256 is {found}, not {SHA256}.")
        with tarfile.open(tarball) as archive:
            bundle = archive.extractfile(BUNDLE).read()
        texts = [f"NiiVue {VERSION} (https://github.com/niivue/niivue)\n\n{NIIVUE_LICENSE}"]
        texts += [f"{package}, bundled in NiiVue\n\n{license_of(package, folder)}\n" for package in BUNDLED]
    licenses = ("\n" + "-" * 80 + "\n\n").join(texts)
    return {"niivue.js.gz": gzip.compress(bundle, 9, mtime=0), "LICENSES.txt": licenses.encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    check = parser.parse_args().check
    for name, content in build().items():
        path = TARGET / name
        # compare the decompressed content, because compression depends on the zlib version
        same = path.exists() and _content(path.read_bytes()) == _content(content)
        if check and not same:
            sys.exit(f"{path}: differs from the build from npm.")
        if not same:
            path.write_bytes(content)
        print(f"{path}  {len(content) / 2**10:.0f} KiB  {'as before' if same else 'written'}")


def _content(data: bytes) -> bytes:
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


if __name__ == "__main__":
    main()
