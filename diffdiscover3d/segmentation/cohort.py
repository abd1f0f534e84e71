"""Many scans: a manifest of all scans, and one table of the parts of all scans.

Both files are derived from the sidecars, so they need no lock: each process writes them again until they agree with
what is on disk. The last process to finish sees the results of all.
"""

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from diffdiscover3d.data.formats.registry import display_name
from diffdiscover3d.errors import DiffDiscoverError, OutputError
from diffdiscover3d.segmentation.outputs import CaseFiles
from diffdiscover3d.utils.files import read_json_object, write_json, write_text
from diffdiscover3d.utils.terminal import printable

MANIFEST, PARTS = "manifest.tsv", "parts.tsv"
MANIFEST_COLUMNS = ("scan", "status", "input", "input_sha256", "labels", "seconds", "notes", "error")
_MEASURES = ("std_intensity", "centroid_x", "centroid_y", "centroid_z")
PARTS_COLUMNS = (
    *("scan", "level", "part", "volume", "volume_unit", "voxels", "mean_intensity"),
    *(*_MEASURES, "centroid_unit", "components", "neighbours"),
)
_MISSING = "n/a"  # as in BIDS
_ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U000[0-9a-f]{5}|[nrt])")
_SECONDS_BETWEEN = 30.0
_COST_SHARE = 0.02  # of the time that may be spent on the tables while scans are segmented
_TRIES = 5


class Cohort:
    """The manifest and the table of the parts of all scans of a folder.

    Args:
        folder: folder of both files.
        cases: all scans, also those of other processes.
        describe: what a sidecar records about model and arguments, by level.
    """

    def __init__(self, folder: Path, cases: Sequence[CaseFiles], describe: Callable[[], Mapping]):
        self.folder, self.cases, self._describe = folder, cases, describe
        self._next = 0.0

    def __enter__(self) -> "Cohort":
        """Write both files for the first time.

        Raises:
            OutputError: if a file of one of the names is no table of this program, or cannot be written.
        """
        for name, columns in ((MANIFEST, MANIFEST_COLUMNS), (PARTS, PARTS_COLUMNS)):
            path = self.folder / name
            if path.exists() and _read_text(path).split("\n")[0].split("\t") != list(columns):
                raise OutputError(
                    f"{path}: was not written by this version of diffdiscover3d; rename it, or choose another --output."
                )
        self.write()
        return self

    def __exit__(self, *_) -> None:
        self.write()

    def failed(self, case: CaseFiles, error: DiffDiscoverError) -> None:
        """Record the error of a scan, beside where its results would be."""
        write_json(_error_file(case), {"input": display_name(case.input), "error": str(error)})
        self.update()

    def finished(self, case: CaseFiles) -> None:
        """Record that a scan has results; an earlier error is forgotten."""
        _error_file(case).unlink(missing_ok=True)
        self.update()

    def update(self) -> None:
        """Write both files, unless that was done recently."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write both files.

        Raises:
            OutputError: if that is not possible.
        """
        clock = time.monotonic()
        for _ in range(_TRIES):  # until no process has finished a scan meanwhile
            found = self._derive()
            if found == self._on_disk():
                break
            for name, text in found.items():
                write_text(self.folder / name, text)
        now = time.monotonic()
        self._next = now + max(_SECONDS_BETWEEN, (now - clock) / _COST_SHARE)

    def _on_disk(self) -> dict[str, str]:
        return {name: _read_text(self.folder / name) for name in (MANIFEST, PARTS)}

    def _derive(self) -> dict[str, str]:
        described = json.loads(json.dumps(list(self._describe().values())))
        rows, parts = {}, {}
        for case in self.cases:
            scan = self._scan(case)
            sidecars = _sidecars(case, described)
            rows[scan] = self._row(scan, case, sidecars)
            parts[scan] = _part_rows(scan, case, sidecars) if sidecars else []
        for row in _read_rows(self.folder / MANIFEST):  # scans of earlier commands
            complete = row.get("scan") and row.get("labels") and row.get("error")
            if complete and row["scan"] not in rows and (self.folder / _unescaped(row["labels"])).exists():
                rows[row["scan"]], parts[row["scan"]] = row, []
        earlier = parts.keys() - {self._scan(case) for case in self.cases}
        for row in _read_rows(self.folder / PARTS):
            if row.get("scan") in earlier:
                parts[row["scan"]].append(row)
        return {
            MANIFEST: _table(MANIFEST_COLUMNS, (rows[scan] for scan in sorted(rows))),
            PARTS: _table(PARTS_COLUMNS, (row for scan in sorted(parts) for row in parts[scan])),
        }

    def _scan(self, case: CaseFiles) -> str:
        """The name of a scan in the tables: that of its results, without what is common to all."""
        first, *others = case.levels.values()
        end = r"_level-[^_]*_dseg\.[^/]*$" if others else r"(_dseg)?\.[^/]*$"
        return printable(re.sub(end, "", self._relative(first.table)))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _row(self, scan: str, case: CaseFiles, sidecars: list[dict]) -> dict:
        row = {"scan": scan, "input": display_name(case.input)}
        row["labels"] = self._relative(next(iter(case.levels.values())).labels)
        if sidecars:
            first = sidecars[0]
            notes = "; ".join(first.get("notes", []))
            row |= {"status": "done", "input_sha256": first["input"]["sha256"], "seconds": first.get("seconds")}
            return row | ({"notes": notes} if notes else {})
        error = read_json_object(_error_file(case)).get("error")
        return row | ({"status": "pending"} if error is None else {"status": "failed", "error": error})


def _error_file(case: CaseFiles) -> Path:
    first = next(iter(case.levels.values())).sidecar
    return first.with_name(f"{first.stem}_error.json")


def _sidecars(case: CaseFiles, described: list[dict]) -> list[dict]:
    """The sidecars of all levels, if all results exist and are of this model and these arguments; otherwise none."""
    if not all(target.exists() for target in case):
        return []
    sidecars = [read_json_object(files.sidecar) for files in case.levels.values()]
    for written, expected in zip(sidecars, described, strict=True):
        for key in ("model", "arguments"):
            old, new = written.get(key), expected[key]
            if not isinstance(old, dict) or _without_device(old) != _without_device(new):
                return []
    return sidecars


def _without_device(values: dict) -> dict:
    return {k: v for k, v in values.items() if k != "device"}


def _part_rows(scan: str, case: CaseFiles, sidecars: Sequence[dict]) -> list[dict]:
    """A row for each part of each level of a scan, from its own tables."""
    found = []
    for (level, files), sidecar in zip(case.levels.items(), sidecars, strict=True):
        volume = next((key for key in sidecar if key.startswith("volume_")), None)
        for part in _read_rows(files.table):
            row = {"scan": scan, "level": level, "part": part["index"]}
            row |= {name: part.get(name) for name in ("voxels", "mean_intensity", "components", "neighbours")}
            row |= {name: part.get(name) for name in _MEASURES}
            row["centroid_unit"] = sidecar.get("centroid_x", {}).get("Units")
            if volume is not None:
                row |= {"volume": part.get(volume), "volume_unit": sidecar[volume].get("Units")}
            found.append(row)
    return found


def _unescaped(text: str) -> str:
    """A name of which the tables hold [`printable`] text."""
    return _ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), text)


def _table(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column) for column in columns]
        writer.writerow([_MISSING if v is None or v == "" else printable(v) for v in values])
    return text.getvalue()


def _read_rows(path: Path) -> list[dict]:
    """The rows of a table; none if it does not exist."""
    return list(csv.DictReader(io.StringIO(_read_text(path)), delimiter="\t"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
