"""Time and peak memory of `diffdiscover3d segment` on a scan beyond memory: python -m benchmarks.speed.large_volume.

With `--spacing 2`, the scan of 1 mm is resampled to voxels of 2 mm on the disk and its labels are brought back.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.synthetic import synthesize
from diffdiscover3d.models.embedded import DEFAULT_MODEL, embedded_models
from diffdiscover3d.utils.files import read_json, write_json
from diffdiscover3d.utils.provenance import describe_environment

RESULT, RESAMPLED = RESULTS / "large-volume.json", RESULTS / "large-volume-resampled.json"


def write_scan(path: Path, shape: tuple[int, ...]) -> None:
    """An int16 `.nii` of synthetic cells side by side, mirrored so that they meet, with noise; a plane at a time."""
    cell = (1000 * synthesize("regular", "test", 0).volume).astype(np.float32)
    tile = np.pad(cell, [(0, n) for n in cell.shape], mode="symmetric")
    across = [np.arange(n) % size for n, size in zip(shape, tile.shape, strict=True)]
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4)).header
    header.set_data_shape(shape)
    header.set_slope_inter(1, 0)
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        header.write_to(file)
        for place in across[2]:
            plane = tile[:, :, place][np.ix_(*across[:2])] + rng.normal(0, 20, shape[:2]).astype(np.float32)
            file.write(plane.astype("<i2").tobytes(order="F"))


def write_model(folder: Path, spacing: float) -> None:
    """The default model with a target spacing at every level."""
    shutil.copytree(embedded_models()[DEFAULT_MODEL].discovery, folder)
    (folder / "checksums.json").unlink()
    config = level = read_json(folder / "config.json")
    while level:
        level["spacing"], level["spacing_unit"] = [spacing] * 3, "mm"
        level = level.get("parent")
    write_json(folder / "config.json", config)


def main() -> None:
    """Write a scan, divide it in a process of its own, and note what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 1024, 512), metavar=("X", "Y", "Z"))
    parser.add_argument("--level", default="1", help="1, 2, 3 or all (default: 1)")
    parser.add_argument(
        "--folder", type=Path, help="where scan and labels are kept meanwhile (default: a temporary one)"
    )
    parser.add_argument("--spacing", type=float, help="target spacing of the model, in mm (default: none)")
    parser.add_argument("--output", type=Path, help=f"default: {RESULT.name}, with a spacing {RESAMPLED.name}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        scan = Path(folder) / "scan.nii"
        write_scan(scan, tuple(options.shape))
        command = [sys.executable, "-m", "diffdiscover3d.cli", "segment", str(scan), "--level", options.level]
        if options.spacing:
            write_model(Path(folder) / "model", options.spacing)
            command += ["--model", str(Path(folder) / "model")]
        clock = time.perf_counter()
        child = subprocess.Popen([*command, "--device", "cpu", "--output", str(Path(folder) / "parts")])
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - clock
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(child.returncode)
        sidecars = sorted((Path(folder) / "parts").glob("*_dseg.json"))
        written = json.loads(sidecars[-1].read_text(encoding="utf-8"))
    result = {
        "shape": list(options.shape),
        "level": options.level,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20), 3),
        "windows": written.get("windows"),
        **({"working_grid": written["working_grid"]} if "working_grid" in written else {}),
        "fractions": [part["fraction"] for part in written["parts"]],
        "environment": describe_environment(),
    }
    write_json(options.output or (RESAMPLED if options.spacing else RESULT), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
