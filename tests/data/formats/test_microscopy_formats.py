"""MRC, TIFF, OME-Zarr, HDF5 and NumPy: values, voxel sizes and units; labels that their own libraries open."""

import mrcfile
import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import stem, with_options
from diffdiscover3d.errors import InputError
from tests.helpers import volume_files as files
from tests.helpers.opened_scans import open_scan

h5py = pytest.importorskip("h5py")
tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")

COLOURS = [(127, 127, 127), (230, 159, 0), (86, 180, 233)]


def stack(dtype=np.uint16) -> np.ndarray:
    """(z, y, x) with the largest value in the first voxel."""
    return files.phantom((7, 9, 12)).astype(dtype)


def write_labels(volume, folder):
    """A label map of three parts, written on the grid of a volume in two pieces."""
    labels = np.digitize(volume.data, [300, 600]).astype(np.uint8)
    on_file = volume.to_input_grid(labels).T
    target = folder / f"parts{volume.results.suffix}"
    with volume.results.stream(target, np.uint8, on_file.shape[::-1], COLOURS) as write:
        write(on_file[:3])
        write(on_file[3:])
    return target


def expected(values: np.ndarray) -> np.ndarray:
    return np.digitize(values, [300, 600])


# --- MRC -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2), (2, 3, 1), (3, 1, 2)])
def test_mrc_in_every_axis_order(tmp_path, order):
    sections = stack(np.float32)
    path = files.write_mrc(tmp_path / "map.mrc", sections, (4, 5, 8), origin=(10, 20, 30), order=order)
    volume = read_volume(path)
    # columns run along axis order[0] of space, rows along order[1], sections along order[2]
    assert np.array_equal(volume.data, np.moveaxis(sections.T, [0, 1, 2], [axis - 1 for axis in order]))
    assert np.allclose(volume.spacing_mm, np.array([4, 5, 8]) * 1e-7)
    assert np.allclose(volume.affine[:3, 3], np.array([10, 20, 30]) * 1e-7)
    assert volume.unit == "angstrom" and not volume.anatomical
    target = write_labels(volume, tmp_path)
    with mrcfile.open(target) as written, mrcfile.open(path) as source:
        assert mrcfile.validate(target)
        assert np.array_equal(written.data, expected(sections)) and written.data.dtype == np.int8
        assert written.voxel_size == source.voxel_size
        for name in ("origin", "cella", "mapc", "mapr", "maps", "mx", "nxstart"):
            assert written.header[name] == source.header[name]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32, np.uint16, np.float16])
def test_mrc_modes_and_gzip(tmp_path, dtype):
    sections = (stack() // 10).astype(dtype)
    plain = files.write_mrc(tmp_path / "a.map", sections)
    with mrcfile.new(tmp_path / "a.map.gz", sections, compression="gzip") as file:
        file.set_volume()
        file.voxel_size = 2.0
    assert np.array_equal(read_volume(plain).data, sections.T)
    zipped = read_volume(tmp_path / "a.map.gz")
    assert np.array_equal(zipped.data, sections.T) and np.allclose(zipped.spacing_mm, 2e-7)


def test_mrc_start_is_the_place_where_no_origin_is(tmp_path):
    path = files.write_mrc(tmp_path / "a.mrc", stack(np.float32))
    with mrcfile.open(path, "r+") as file:
        file.nstart = (3, -4, 5)
    assert np.allclose(read_volume(path).affine[:3, 3], np.array([12, -20, 40]) * 1e-7)


def test_many_parts_need_two_bytes_in_mrc(tmp_path):
    volume = read_volume(files.write_mrc(tmp_path / "a.mrc", stack(np.float32)))
    labels = (np.arange(volume.data.size) % 200).reshape(volume.data.shape).astype(np.uint8)
    planes = volume.to_input_grid(labels).T
    with volume.results.stream(tmp_path / "p.mrc", np.uint8, planes.shape[::-1], [(0, 0, 0)] * 200) as write:
        write(planes)
    assert np.array_equal(mrcfile.read(tmp_path / "p.mrc"), planes)


def test_mrc_that_is_no_volume(tmp_path):
    with mrcfile.new(tmp_path / "flat.mrc", np.zeros((5, 6), np.float32)):
        pass
    with pytest.raises(ValueError, match="a single image"):
        read_volume(tmp_path / "flat.mrc")
    with mrcfile.new(tmp_path / "complex.mrc", np.zeros((5, 6, 7), np.complex64)):
        pass
    with pytest.raises(ValueError, match="complex"):
        read_volume(tmp_path / "complex.mrc")
    four = np.stack([stack(np.float32), stack(np.float32) * 2])
    with mrcfile.new(tmp_path / "four.mrc", four):
        pass
    with pytest.raises(ValueError, match="--volume N"):
        read_volume(tmp_path / "four.mrc")
    volume = read_volume(tmp_path / "four.mrc", volume=1)
    assert np.array_equal(volume.data, four[1].T)
    target = write_labels(volume, tmp_path)
    assert mrcfile.read(target).shape == four[1].shape


# --- TIFF ----------------------------------------------------------------------------------------------------------


def test_imagej_stack(tmp_path):
    path = tmp_path / "cells.tif"
    data = stack()
    metadata = {"axes": "ZYX", "spacing": 0.5, "unit": "um"}
    tifffile.imwrite(path, data, imagej=True, resolution=(1 / 0.2, 1 / 0.25), metadata=metadata)
    volume = read_volume(path)
    # x as it is; y and z turned half a turn around it, which shows the first row at the top
    assert np.array_equal(volume.data, data.T[:, ::-1, ::-1])
    assert np.allclose(volume.spacing_mm, (0.0002, 0.00025, 0.0005))
    corner = volume.affine @ [*np.unravel_index(volume.data.argmax(), volume.data.shape), 1]
    assert np.allclose(corner[:3], 0, atol=1e-12)  # the first voxel lies at the origin
    assert np.linalg.det(volume.affine) > 0
    target = write_labels(volume, tmp_path)
    with tifffile.TiffFile(target) as written:
        assert written.is_imagej and written.series[0].axes == "ZYX"
        assert np.array_equal(written.asarray(), expected(data))
        assert written.imagej_metadata["unit"] == "um" and np.isclose(written.imagej_metadata["spacing"], 0.5)
        across, down = (written.pages[0].tags[f"{a}Resolution"].value for a in "XY")
        assert np.isclose(across[0] / across[1], 5) and np.isclose(down[0] / down[1], 4)
    assert np.allclose(read_volume(target).affine, volume.affine, rtol=1e-6)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("axes", ["ZYX", "CZYX", "TCZYX", "ZCYX"])
def test_ome_tiff(tmp_path, axes, compression):
    data = stack()
    channels = [data, data + 5]
    full = {
        "ZYX": data,
        "CZYX": np.stack(channels),
        "TCZYX": np.stack([channels, channels]),
        "ZCYX": np.stack(channels, axis=1),
    }[axes]
    path = tmp_path / "cells.ome.tif"
    size = {"PhysicalSizeX": 200.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeZ": 0.5}
    tifffile.imwrite(path, full, compression=compression, photometric="minisblack", metadata={"axes": axes, **size})
    if axes != "ZYX":
        with pytest.raises(ValueError, match=f"contains {full.size // data.size} volumes"):
            read_volume(path)
    volume = read_volume(path, volume=None if axes == "ZYX" else 1)
    assert np.array_equal(volume.data, (data if axes == "ZYX" else data + 5).T[:, ::-1, ::-1])
    assert np.allclose(volume.spacing_mm, (0.0002, 0.00025, 0.0005))


def test_pages_written_one_by_one_are_a_stack(tmp_path):
    data = stack()
    for metadata in ({}, None):
        with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
            for page in data:
                file.write(page, contiguous=False, metadata=metadata)
        volume = read_volume(tmp_path / "pages.tif")
        assert np.array_equal(volume.data, data.T[:, ::-1, ::-1])
        assert volume.unit == "voxel" and any("no voxel size" in note for note in volume.notes)
    with_size = read_volume(tmp_path / "pages.tif", voxel_size="0.1,0.1,0.3um")
    assert np.allclose(with_size.spacing_mm, (1e-4, 1e-4, 3e-4)) and with_size.unit == "um"
    assert not any("voxel size" in note for note in with_size.notes)


def test_a_level_of_a_pyramid(tmp_path):
    data = np.random.default_rng(0).integers(0, 99, (8, 32, 48)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif") as file:
        size = {"PhysicalSizeX": 0.2, "PhysicalSizeY": 0.2, "PhysicalSizeZ": 0.5}
        file.write(data, subifds=1, tile=(16, 16), photometric="minisblack", metadata={"axes": "ZYX", **size})
        file.write(data[:, ::2, ::2], subfiletype=1, tile=(16, 16), photometric="minisblack")
    assert np.array_equal(read_volume(tmp_path / "pyramid.ome.tif").data, data.T[:, ::-1, ::-1])
    coarse = read_volume(tmp_path / "pyramid.ome.tif", resolution=1)
    assert np.array_equal(coarse.data, data[:, ::2, ::2].T[:, ::-1, ::-1])
    assert np.allclose(coarse.spacing_mm, (0.0004, 0.0004, 0.0005))
    with pytest.raises(ValueError, match=r"has 2 resolution\(s\)"):
        read_volume(tmp_path / "pyramid.ome.tif", resolution=2)


def test_tiff_that_is_no_volume(tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", stack()[0])
    with pytest.raises(ValueError, match="a single image"):
        read_volume(tmp_path / "flat.tif")
    tifffile.imwrite(tmp_path / "time.ome.tif", stack(), metadata={"axes": "TYX"})
    with pytest.raises(ValueError, match=r"7 along T\) without an axis Z"):
        read_volume(tmp_path / "time.ome.tif")
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((4, 9, 8, 3), np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match="RGB"):
        read_volume(tmp_path / "rgb.tif")


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "z.tif", stack(), compression="zstd", photometric="minisblack")

    def missing(*_, **__):
        raise ValueError("<COMPRESSION.ZSTD: 50000> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", missing)
    with pytest.raises(ValueError, match=r'needs imagecodecs: pip install "diffdiscover3d\[microscopy\]"'):
        read_volume(tmp_path / "z.tif")


# --- Zarr ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axes", ["zyx", "czyx", "tczyx"])
def test_ome_zarr(tmp_path, zarr_format, axes):
    data = stack()
    full = {"zyx": data, "czyx": np.stack([data, data + 5]), "tczyx": np.stack([data, data + 5])[None]}[axes]
    path = files.write_ome_zarr(tmp_path / "cells.ome.zarr", full, zarr_format, axes, levels=2)
    volume = read_volume(path, volume=None if axes == "zyx" else 1)
    assert np.array_equal(volume.data, (data if axes == "zyx" else data + 5).T[:, ::-1, ::-1])
    assert np.allclose(volume.spacing_mm, (0.00025, 0.0002, 0.0005))
    first = volume.affine @ [*np.unravel_index(volume.data.argmax(), volume.data.shape), 1]
    assert np.allclose(first[:3], (0.001, 0, 0.003))
    coarse = read_volume(path, volume=None if axes == "zyx" else 1, resolution=1)
    assert np.array_equal(coarse.data, volume.data[::2, ::-2, ::-2][:, ::-1, ::-1])
    assert np.allclose(coarse.spacing_mm, (0.0005, 0.0004, 0.001))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_labels_open_in_ome_zarr(tmp_path, zarr_format):
    io, reader = pytest.importorskip("ome_zarr.io"), pytest.importorskip("ome_zarr.reader")
    data = np.random.default_rng(1).integers(0, 900, (70, 9, 12)).astype(np.uint16)  # more planes than a chunk has
    volume = read_volume(files.write_ome_zarr(tmp_path / "cells.ome.zarr", data, zarr_format))
    target = write_labels(volume, tmp_path)
    nodes = list(reader.Reader(io.parse_url(target))())  # with the image that the labels name as their source
    (found,) = [node for node in nodes if "color" in node.metadata]
    assert np.array_equal(np.asarray(found.data[0]), expected(data))
    assert found.metadata["axes"] == [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    scale, shift = found.metadata["coordinateTransformations"][0]
    assert np.allclose(scale["scale"], (0.5, 0.2, 0.25)) and np.allclose(shift["translation"], (3, 0, 1))
    assert np.allclose(found.metadata["color"][1], [*(c / 255 for c in COLOURS[1]), 1])
    again = read_volume(target)
    assert np.array_equal(again.affine, volume.affine)
    models = pytest.importorskip("ome_zarr_models")
    models.open_ome_zarr(zarr.open_group(target, mode="r"))


def test_missing_chunks_are_refused_or_filled(tmp_path):
    path = files.write_ome_zarr(tmp_path / "cells.zarr", stack())
    chunk = next(p for p in sorted((path / "0" / "c").rglob("*")) if p.is_file())
    chunk.unlink()
    with pytest.raises(ValueError, match=r"1 of 18 chunks are missing; .*--missing-chunks"):
        read_volume(path)
    filled = read_volume(path, missing_chunks=True).data[:, ::-1, ::-1].T
    assert not filled[:4, :4, :4].any() and np.array_equal(filled[4:], stack()[4:])


def test_a_zarr_array_without_metadata_and_one_in_a_group(tmp_path):
    zarr.save_array(tmp_path / "plain.zarr", stack())
    plain = read_volume(tmp_path / "plain.zarr")
    assert np.array_equal(plain.data, stack().T[:, ::-1, ::-1]) and plain.unit == "voxel"
    group = zarr.open_group(tmp_path / "many.zarr", mode="w")
    group.create_group("a")
    for name, values in (("a/raw", stack()), ("b", stack() + 1)):
        group.create_array(name, shape=values.shape, dtype=values.dtype)[:] = values
    with pytest.raises(ValueError, match=r"holds a/raw, b; name one as many.zarr::NAME"):
        read_volume(tmp_path / "many.zarr")
    inner = read_volume(f"{tmp_path / 'many.zarr'}::a/raw")
    assert np.array_equal(inner.data, plain.data)
    assert stem(f"{tmp_path / 'many.zarr'}::a/raw") == "many_a_raw"


def test_damaged_zarr_is_one_line(tmp_path):
    path = files.write_ome_zarr(tmp_path / "a.zarr", stack())
    chunk = next(p for p in sorted((path / "0" / "c").rglob("*")) if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:7])
    with pytest.raises(ValueError, match=r"a\.zarr: .*copy or convert") as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)
    (path / "zarr.json").write_text("{nonsense")
    with pytest.raises(ValueError, match=r"a\.zarr: is a damaged Zarr store"):
        read_volume(path)


# --- HDF5 and NumPy ------------------------------------------------------------------------------------------------


def test_hdf5(tmp_path):
    data = stack()
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        raw = file.create_dataset("volumes/raw", data=data, chunks=(3, 4, 5), compression="gzip")
        raw.attrs["element_size_um"] = (0.5, 0.2, 0.25)
        file["notes"] = [1, 2, 3]
    volume = read_volume(tmp_path / "cells.h5")
    assert np.array_equal(volume.data, data.T[:, ::-1, ::-1])
    assert np.allclose(volume.spacing_mm, (0.00025, 0.0002, 0.0005))
    target = write_labels(volume, tmp_path)
    with h5py.File(target) as written:
        assert np.array_equal(written["labels"], expected(data))
        assert np.allclose(written["labels"].attrs["element_size_um"], (0.5, 0.2, 0.25))
    assert np.array_equal(read_volume(target).affine, volume.affine)


def test_hdf5_as_cremi_writes_it_and_several_datasets(tmp_path):
    data = stack()
    with h5py.File(tmp_path / "cremi.hdf", "w") as file:
        raw = file.create_dataset("raw", data=data)
        raw.attrs["resolution"], raw.attrs["offset"] = (40.0, 4.0, 4.0), (400.0, 0.0, 8.0)
        file.create_dataset("two/channels", data=np.stack([data, data + 1]))
    with pytest.raises(ValueError, match=r"holds 2 datasets \(/raw 7×9×12, /two/channels 2×7×9×12\).*cremi.hdf::/path"):
        read_volume(tmp_path / "cremi.hdf")
    volume = read_volume(f"{tmp_path}/cremi.hdf::/raw")
    assert np.allclose(volume.spacing_mm, (4e-6, 4e-6, 4e-5))
    first = volume.affine @ [*np.unravel_index(volume.data.argmax(), volume.data.shape), 1]
    assert np.allclose(first[:3], (8e-6, 0, 4e-4))
    assert read_volume(f"{tmp_path}/cremi.hdf::two/channels", volume=1).data.max() == 1001
    with pytest.raises(ValueError, match="no dataset /nothing"):
        read_volume(f"{tmp_path}/cremi.hdf::/nothing")


def test_numpy_arrays_are_as_functions_take_them(tmp_path):
    data = files.phantom()
    np.save(tmp_path / "a.npy", data)
    np.save(tmp_path / "f.npy", np.asfortranarray(data))
    np.savez_compressed(tmp_path / "b.npz", image=data, other=data + 1)
    for path in (tmp_path / "a.npy", tmp_path / "f.npy", f"{tmp_path}/b.npz::image"):
        volume = read_volume(path)
        assert np.array_equal(volume.data, data) and volume.spacing_mm == (1, 1, 1) and volume.unit == "voxel"
    with pytest.raises(ValueError, match=r"holds 2 arrays \(image, other\)"):
        read_volume(tmp_path / "b.npz")
    target = write_labels(read_volume(tmp_path / "a.npy"), tmp_path)
    assert np.array_equal(np.load(target), expected(data))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="damaged NumPy file"):
        read_volume(tmp_path / "objects.npy")


# --- all -----------------------------------------------------------------------------------------------------------


def _write(kind, folder):
    data = stack(np.float32)
    if kind == "mrc":
        return files.write_mrc(folder / "a.mrc", data)
    if kind == "tif":
        tifffile.imwrite(folder / "a.tif", data, compression="zlib", photometric="minisblack")
        return folder / "a.tif"
    if kind == "imagej":
        tifffile.imwrite(folder / "j.tif", data, imagej=True, metadata={"axes": "ZYX"})
        return folder / "j.tif"
    if kind == "h5":
        with h5py.File(folder / "a.h5", "w") as file:
            file["raw"] = data
        return folder / "a.h5"
    if kind == "npy":
        np.save(folder / "a.npy", data)
        return folder / "a.npy"
    return files.write_ome_zarr(folder / "a.ome.zarr", data)


KINDS = ["mrc", "tif", "imagej", "h5", "npy", "zarr"]


@pytest.mark.parametrize("kind", KINDS)
def test_slabs_are_the_volume(tmp_path, kind):
    path = _write(kind, tmp_path)
    whole = read_volume(path)
    with open_scan(path, tmp_path) as scan:
        region = tuple(slice(1, n - 1) for n in whole.data.shape)
        assert np.array_equal(scan.read(region), whole.data[region])
        assert (scan.low, scan.high) == (whole.data.min(), whole.data.max())
        assert np.array_equal(scan.affine, whole.affine) and scan.unit == whole.unit


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_refused_or_zero(tmp_path, kind):
    data = stack(np.float32)
    data[2, 3, 4] = np.nan
    path = {"mrc": "n.mrc", "tif": "n.tif", "imagej": "n.ome.tif", "h5": "n.h5", "npy": "n.npy", "zarr": "n.zarr"}[kind]
    path = tmp_path / path
    if kind == "mrc":
        files.write_mrc(path, data)
    elif kind in ("tif", "imagej"):
        tifffile.imwrite(path, data, photometric="minisblack", metadata={"axes": "ZYX"})
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file["raw"] = data
    elif kind == "npy":
        np.save(path, data)
    else:
        files.write_ome_zarr(path, data)
    with pytest.raises(ValueError, match="1 of 756 voxels are NaN"):
        read_volume(path)
    assert np.isfinite(read_volume(path, nan_to_zero=True).data).all()


@pytest.mark.parametrize("kind", ["mrc", "tif", "imagej", "h5", "npy"])
@pytest.mark.parametrize("damage", ["truncated", "half", "header only", "empty", "web page", "git lfs", "noise"])
def test_damaged_files_are_one_line(tmp_path, kind, damage):
    path = _write(kind, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: -1200 if kind == "imagej" else -300],  # ImageJ keeps nothing that is needed at the end
            "half": whole[: len(whole) // 2],
            "header only": whole[:200],
            "empty": b"",
            "web page": b"<!DOCTYPE html><html><body>404</body></html>" * 20,
            "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "noise": np.random.default_rng(0).bytes(len(whole)),
        }[damage]
    )
    with pytest.raises(ValueError, match=path.name) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value) and type(caught.value).__name__ == "InputError"
    assert sorted(tmp_path.iterdir()) == [path]


def test_content_decides_where_the_name_tells_nothing(tmp_path):
    tifffile.imwrite(tmp_path / "cells.tif", stack())
    (tmp_path / "cells.tif").rename(tmp_path / "cells")
    assert np.array_equal(read_volume(tmp_path / "cells").data, stack().T[:, ::-1, ::-1])
    tifffile.imwrite(tmp_path / "cells.tif", stack())
    (tmp_path / "cells.tif").rename(tmp_path / "cells.mrc")
    with pytest.raises(ValueError, match=r"cells\.mrc: is no MRC file"):
        read_volume(tmp_path / "cells.mrc")


def test_a_path_may_choose_a_channel(tmp_path):
    full = np.stack([stack(), stack() + 5])
    tifffile.imwrite(tmp_path / "a.ome.tif", full, photometric="minisblack", metadata={"axes": "CZYX"})
    path = with_options(tmp_path / "a.ome.tif", volume=1, resolution=None)
    assert read_volume(path).data.max() == 1005 and stem(path) == "a_volume-1"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x/raw"] = full
    assert read_volume(f"{tmp_path}/a.h5::/x/raw@volume=1").data.max() == 1005
    nib.save(nib.Nifti1Image(np.moveaxis(full, 0, -1), np.eye(4)), tmp_path / "a.nii")
    assert read_volume(f"{tmp_path}/a.nii::@volume=1").data.max() == 1005
    with pytest.raises(InputError, match="behind @ stand"):
        read_volume(f"{tmp_path}/a.nii::@channel=1")
