"""Units as files spell them, and the one that fits a voxel."""

import pytest

from diffdiscover3d.data.formats.units import IN_MM, display_unit, parse_unit, parse_voxel_size


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *[(name, "um") for name in ("µm", "μm", "\\u00b5m", "micron", "Micrometer", "um\0")],
        *[(name, "angstrom") for name in ("Å", "angstrom", "A")],
        *[("nm", "nm"), ("mm", "mm"), ("inch", "inch"), ("pixel", None), ("", None), (None, None)],
    ],
)
def test_spellings(name, unit):
    assert parse_unit(name) == unit


@pytest.mark.parametrize(
    ("spacing_mm", "volume", "cube"),
    [
        ((1, 1, 1), "mL", 1e-3),
        ((0.72, 0.72, 4), "mL", 1e-3),
        ((0.05, 0.05, 0.1), "mm³", 1.0),  # a mouse
        ((2e-4, 2e-4, 5e-4), "µm³", 1e9),  # a cell
        ((1e-6, 1e-6, 1e-6), "nm³", 1e18),  # a tomogram
    ],
)
def test_the_unit_fits_the_voxel(spacing_mm, volume, cube):
    """`cube` is the volume of 1 mm³."""
    unit = display_unit(spacing_mm)
    assert unit.volume == volume and unit.volume_per_mm3 == cube
    assert 1e-2 < max(spacing_mm) * unit.per_mm < 100
    assert display_unit(spacing_mm, "voxel").volume == "voxels"


def test_voxel_sizes_of_the_command_line():
    assert parse_voxel_size("0.1,0.2,0.3um") == ((0.1, 0.2, 0.3), "um")
    assert parse_voxel_size("0.1 x 0.2 x 0.3 mm") == ((0.1, 0.2, 0.3), "mm")
    assert parse_voxel_size("10A") == ((10, 10, 10), "angstrom")
    assert parse_voxel_size("1e-3 1e-3 2e-3 mm") == ((1e-3, 1e-3, 2e-3), "mm")
    for wrong in ("0.1,0.1um", "0.1,0.1,0.3", "0,1,1um", "um", "1,2,3 parsec", "-1um", ""):
        with pytest.raises(ValueError, match="voxel_size"):
            parse_voxel_size(wrong)
    assert IN_MM["angstrom"] == 1e-7
