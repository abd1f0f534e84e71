"""One small volume written in every format and orientation, each with the format's own library."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, ornt_transform

CANONICAL = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)
SPACING = np.array([0.75, 1.25, 2.5])
KINDS = ("nrrd", "mha", "mgz", "dicom", "mrc", "npy", "tif", "h5", "zarr")
ORIENTATIONS = [
    np.array(list(zip(axes, flips, strict=True)), dtype=float)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def phantom(shape=(9, 11, 13), dtype=np.int16) -> np.ndarray:
    """(H, W, D) values that differ from voxel to voxel, the largest in the corner at the low end of every axis."""
    data = np.random.default_rng(4).integers(0, 900, shape).astype(dtype)
    data[0, 0, 0] = 1000
    return data


def canonical_affine() -> np.ndarray:
    """Of the phantom, in mm."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20.0, 31.5, 7.25)
    return affine


def stored(orientation: np.ndarray, data: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The phantom on file axes of an orientation (as `io_orientation` gives it), and the affine of that array."""
    data = phantom() if data is None else data
    turn = ornt_transform(CANONICAL, orientation)
    array = apply_orientation(data, turn)
    return array, canonical_affine() @ inv_ornt_aff(turn, data.shape)


def write_sitk(path: Path, array: np.ndarray, affine: np.ndarray, compress: bool = False) -> Path:
    """NRRD or MetaImage, by the ending."""
    import SimpleITK as sitk

    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), compress)
    return path


def write_dicom(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    uid: str = "1.2.826.0.1.3680043.8.498.7",
    number: int = 3,
    slope: float = 1.0,
    intercept: float = 0.0,
    first_instance: int = 1,
    skip=(),
) -> Path:
    """A CT series with a file for each slice along the last axis, in an order that is not that of their names."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / steps
    count = array.shape[2]
    for k in range(count):
        if k in skip:
            continue
        header = pydicom.Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = f"{uid}.{first_instance + k}"
        header.StudyInstanceUID, header.SeriesInstanceUID, header.SeriesNumber = (
            "1.2.826.0.1.3680043.8.498.1",
            uid,
            number,
        )
        header.Modality, header.PatientName, header.SeriesDescription = "CT", "Test^Person", f"series {number}"
        header.InstanceNumber = first_instance + k
        header.ImagePositionPatient = [float(f"{x:.6f}") for x in lps[:3, 3] + k * lps[:3, 2]]
        header.ImageOrientationPatient = [*directions[:, 0].tolist(), *directions[:, 1].tolist()]
        header.PixelSpacing = [float(steps[1]), float(steps[0])]
        header.SliceThickness = float(steps[2])
        header.Rows, header.Columns = array.shape[1], array.shape[0]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 1
        header.RescaleSlope, header.RescaleIntercept = slope, intercept
        header.PixelData = np.ascontiguousarray(array[:, :, k].T.astype("<i2")).tobytes()
        name = f"IM{(k * 7) % count if count % 7 else k:04d}_{number}_{first_instance}"  # without an ending
        header.save_as(folder / name, enforce_file_format=True)
    return folder


def write_mgh(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """MGH or MGZ."""
    nib.save(nib.MGHImage(array, affine), path)
    return path


def write_minc2(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """MINC 2: HDF5 whose dimensions, slowest first, are named by the axis of space nearest to them."""
    import h5py

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / lengths
    names = [f"{'xyz'[int(np.abs(directions[:, i]).argmax())]}space" for i in range(3)]
    # the start of each dimension is along its own direction cosines
    starts = np.linalg.solve(directions, affine[:3, 3])
    with h5py.File(path, "w") as file:
        image = file.create_group("minc-2.0/image/0")
        dimensions = file.create_group("minc-2.0/dimensions")
        for i, name in enumerate(names):
            dimension = dimensions.create_dataset(name, (), "i4")
            dimension.attrs["step"], dimension.attrs["start"] = lengths[i], starts[i]
            dimension.attrs["direction_cosines"] = directions[:, i]
            dimension.attrs["length"] = array.shape[i]
            dimension.attrs["spacing"] = np.bytes_("regular__")
        data = image.create_dataset("image", data=array.T)
        data.attrs["dimorder"] = np.bytes_(",".join(reversed(names)))
        data.attrs["valid_range"] = np.array([array.min(), array.max()], dtype=float)
        for key, value in (("image-min", array.min()), ("image-max", array.max())):
            image.create_dataset(key, data=float(value)).attrs["dimorder"] = np.bytes_("")
    return path


def write_mrc(path: Path, sections: np.ndarray, size=(4.0, 5.0, 8.0), origin=(0.0, 0.0, 0.0), order=(1, 2, 3)) -> Path:
    """MRC from (section, row, column); `size` is the voxel size along x, y, z in Å and `order` mapc, mapr, maps."""
    import mrcfile

    with mrcfile.new(path, sections, overwrite=True) as file:
        file.set_volume()
        stored = dict(zip(order, sections.shape[::-1], strict=True))  # voxels along each axis of space
        file.header.mx, file.header.my, file.header.mz = (sections.shape[2], sections.shape[1], sections.shape[0])
        file.header.mapc, file.header.mapr, file.header.maps = order
        # mx, my, mz count along x, y, z
        file.header.mx, file.header.my, file.header.mz = stored[1], stored[2], stored[3]
        file.header.cella = tuple(s * stored[axis] for axis, s in zip((1, 2, 3), size, strict=True))
        file.header.origin = origin
    return path


def write_ome_zarr(path: Path, volume: np.ndarray, zarr_format: int = 3, axes: str = "zyx", levels: int = 1) -> Path:
    """OME-Zarr of an array with these axes; voxels of 0.5, 0.2, 0.25 µm, the image starts at 3, 0, 1 µm."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    size = {"z": 0.5, "y": 0.2, "x": 0.25}
    start = {"z": 3.0, "x": 1.0}
    described = [
        {"name": a, "type": "space", "unit": "micrometer"} if a in size else {"name": a, "type": "channel"}
        for a in axes
    ]
    datasets = []
    for level in range(levels):
        cut = tuple(slice(None, None, 2**level) if a in size else slice(None) for a in axes)
        array = volume[cut]
        chunks = tuple(min(4, n) for n in array.shape)
        group.create_array(str(level), shape=array.shape, dtype=array.dtype, chunks=chunks)[:] = array
        scale = [size.get(a, 1.0) * (2**level if a in size else 1) for a in axes]
        transforms = [
            {"type": "scale", "scale": scale},
            {"type": "translation", "translation": [start.get(a, 0.0) for a in axes]},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    image = {"name": "cells", "axes": described, "datasets": datasets}
    if zarr_format == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [{**image, "version": "0.4"}]
    return path


def write_as(folder: Path, kind: str, values: np.ndarray) -> Path | str:
    """A canonical (H, W, D) volume as `scan.<kind>` in a format of `KINDS`; what is returned names it."""
    image = values[:, ::-1, ::-1].T  # (z, y, x) of an image whose first row is at the top
    if kind in ("nrrd", "mha", "mgz", "dicom"):
        array, affine = stored(ORIENTATIONS[27], values)
        writers = {"nrrd": write_sitk, "mha": write_sitk, "mgz": write_mgh}
        return (
            write_dicom(folder / "scan", array, affine)
            if kind == "dicom"
            else writers[kind](folder / f"scan.{kind}", array, affine)
        )
    if kind == "mrc":
        return write_mrc(folder / "scan.mrc", np.ascontiguousarray(values.T))
    if kind == "npy":
        np.save(folder / "scan.npy", values)
        return folder / "scan.npy"
    if kind == "tif":
        import tifffile

        tifffile.imwrite(folder / "scan.tif", image, photometric="minisblack")
        return folder / "scan.tif"
    if kind == "h5":
        import h5py

        with h5py.File(folder / "scan.h5", "w") as file:
            file["a/raw"] = image
        return f"{folder / 'scan.h5'}::/a/raw"
    return write_ome_zarr(folder / "scan.ome.zarr", image)
