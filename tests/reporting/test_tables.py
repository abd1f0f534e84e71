"""Tables of parts, parsed by the published rules of BIDS, ITK-SNAP and 3D Slicer."""

import csv
import re

import numpy as np
import pytest

from diffdiscover3d.reporting.colours import part_colour
from diffdiscover3d.reporting.frames import frame_of
from diffdiscover3d.reporting.parts import measure_parts
from diffdiscover3d.reporting.tables import (
    part_columns,
    statistics_columns,
    write_itksnap_labels,
    write_part_table,
    write_slicer_colours,
)

COUNT = 20  # beyond the palette


def rgb(part):
    return [int(part_colour(part)[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("topology", [False, True])
def test_bids_table(tmp_path, topology):
    labels = np.random.default_rng(0).integers(0, COUNT - 1, (9, 8, 7)).astype(np.uint8)
    parts = measure_parts(labels, labels + np.float32(0.5), np.diag([2, 2, 2, 1]), COUNT, topology=topology)
    write_part_table(tmp_path / "x_dseg.tsv", parts)
    text = (tmp_path / "x_dseg.tsv").read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines(), delimiter="\t"))
    header = rows[0]
    # BIDS: tabs, a header of unique snake_case names, as many values in each row, none empty, n/a for missing
    assert len(set(header)) == len(header) and all(re.fullmatch("[a-z][a-z_]*", name) for name in header)
    assert header[:4] == ["index", "name", "abbreviation", "color"]
    assert set(header[4:]) == {*part_columns(), *(statistics_columns() if topology else ())}
    assert text.endswith("\n") and "\r" not in text and '"' not in text
    assert all(len(row) == len(header) and all(cell.strip() == cell != "" for cell in row) for row in rows)
    table = [dict(zip(header, row, strict=True)) for row in rows[1:]]
    assert [int(row["index"]) for row in table] == list(range(COUNT))
    assert len({row["name"] for row in table}) == len({row["abbreviation"] for row in table}) == COUNT
    for row in table:
        assert re.fullmatch("#[0-9a-f]{6}", row["color"])
        assert int(row["voxels"]) == (labels == int(row["index"])).sum()
        assert float(row["volume_ml"]) == pytest.approx(int(row["voxels"]) * 8 / 1000)
    assert table[-1]["voxels"] == "0" and table[-1]["mean_intensity"] == "n/a"
    if topology:
        assert table[-1]["neighbours"] == table[-1]["centroid_x"] == "n/a" and int(table[0]["components"]) > 0


def test_the_table_is_in_the_unit_of_the_scan(tmp_path):
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1:3, 1:4, 1:5] = 1  # 24 voxels
    affine = np.diag([2e-4, 3e-4, 5e-4, 1])  # mm
    parts = measure_parts(labels, labels.astype(np.float32), affine, 2, topology=True)
    write_part_table(tmp_path / "x.tsv", parts, frame_of((2e-4, 3e-4, 5e-4), "um", anatomical=False))
    row = list(csv.DictReader((tmp_path / "x.tsv").read_text().splitlines(), delimiter="\t"))[1]
    assert float(row["volume_um3"]) == pytest.approx(24 * 0.2 * 0.3 * 0.5)
    assert [float(row[f"centroid_{a}"]) for a in "xyz"] == pytest.approx([1.5 * 0.2, 2 * 0.3, 2.5 * 0.5])
    write_part_table(tmp_path / "y.tsv", parts, frame_of((1, 1, 1), "voxel", anatomical=False))
    assert "volume" not in (tmp_path / "y.tsv").read_text().splitlines()[0]


@pytest.mark.parametrize("background", [None, "background"])
def test_itksnap_label_file(tmp_path, background):
    write_itksnap_labels(tmp_path / "x.label", COUNT, background)
    # the format of ITK-SNAP's ColorLabelTable::LoadFromFile: # begins a comment; seven numbers, then a quoted name
    pattern = re.compile(r'^\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"([^"]*)"$')
    lines = [line for line in (tmp_path / "x.label").read_text().splitlines() if not line.startswith("#")]
    found = [pattern.match(line).groups() for line in lines]
    assert [int(f[0]) for f in found] == list(range(COUNT))
    for part, (_, red, green, blue, alpha, visible, mesh, name) in enumerate(found):
        assert [int(red), int(green), int(blue)] == rgb(part) and name == (
            background if background and not part else f"part {part}"
        )
        assert float(alpha) == int(visible) == int(mesh) == (part > 0 or not background)


@pytest.mark.parametrize("background", [None, "background"])
def test_slicer_colour_table(tmp_path, background):
    write_slicer_colours(tmp_path / "x.ctbl", COUNT, background)
    # vtkMRMLColorTableStorageNode: # begins a comment; index, name without spaces, red, green, blue, alpha in 0..255
    lines = [line for line in (tmp_path / "x.ctbl").read_text().splitlines() if not line.startswith("#")]
    for part, line in enumerate(lines):
        index, name, *numbers = line.split()
        assert (int(index), name) == (part, background if background and not part else f"part_{part}")
        assert [int(n) for n in numbers] == [*rgb(part), 255 if part or not background else 0]
    assert len(lines) == COUNT
