"""DICOM, NRRD, MetaImage, MGH, MINC and Analyze: the same volume in every orientation, labels that lie on it."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import open_volume
from tests.helpers import volume_files as files
from tests.helpers.opened_scans import open_scan

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")

WRITERS = {
    "nrrd": lambda folder, *grid: files.write_sitk(folder / "scan.nrrd", *grid),
    "nrrd-gzip": lambda folder, *grid: files.write_sitk(folder / "scan.nrrd", *grid, compress=True),
    "mha": lambda folder, *grid: files.write_sitk(folder / "scan.mha", *grid),
    "mhd": lambda folder, *grid: files.write_sitk(folder / "scan.mhd", *grid),
    "dicom": lambda folder, *grid: files.write_dicom(folder / "series", *grid),
    "mgz": lambda folder, *grid: files.write_mgh(folder / "scan.mgz", *grid),
    "minc2": lambda folder, *grid: files.write_minc2(folder / "scan.mnc", *grid),
}
# MINC gives its axes positive directions
POSITIVE = [o for o in files.ORIENTATIONS if (o[:, 1] > 0).all()]


def _orientations(kind):
    return {"minc2": POSITIVE, "nrrd": files.ORIENTATIONS, "mgz": files.ORIENTATIONS}.get(kind, files.ORIENTATIONS[::5])


CASES = [
    pytest.param(kind, o, id=f"{kind}-{''.join(nib.orientations.ornt2axcodes(o))}")
    for kind in WRITERS
    for o in _orientations(kind)
]


@pytest.mark.parametrize(("kind", "orientation"), CASES)
def test_every_orientation_comes_in_as_one_volume(tmp_path, kind, orientation):
    array, affine = files.stored(orientation)
    path = WRITERS[kind](tmp_path, array, affine)
    volume = read_volume(path)
    assert np.array_equal(volume.data, files.phantom())
    assert np.allclose(volume.affine, files.canonical_affine(), atol=1e-4)
    assert volume.unit == "mm" and volume.anatomical


@pytest.mark.parametrize(("kind", "orientation"), CASES[::5])
def test_labels_lie_on_the_volume_for_its_own_library(tmp_path, kind, orientation):
    array, affine = files.stored(orientation)
    path = WRITERS[kind](tmp_path, array, affine)
    volume = read_volume(path)
    labels = (volume.data > 450).astype(np.uint8)
    target = tmp_path / f"parts{volume.results.suffix}"
    on_file = volume.to_input_grid(labels)
    with volume.results.stream(target, np.uint8, on_file.shape, [(0, 0, 0), (255, 0, 0)]) as write:
        write(on_file.T[:3])
        write(on_file.T[3:])
    # a world point of the input holds the label of its value, by the libraries alone
    if kind == "dicom":
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        source, written = reader.Execute(), sitk.ReadImage(str(target))
    elif kind in ("mgz", "minc2"):
        source, written = nib.load(path), nib.load(target)
        assert np.allclose(source.affine, written.affine, atol=1e-4)
        assert np.array_equal(np.asarray(written.dataobj), np.asarray(source.dataobj) > 450)
        return
    else:
        source, written = sitk.ReadImage(str(path)), sitk.ReadImage(str(target))
    for index in [(0, 0, 0), (1, 2, 3), tuple(n - 1 for n in source.GetSize())]:
        point = source.TransformIndexToPhysicalPoint(index)
        assert np.allclose(written.TransformPhysicalPointToContinuousIndex(point), index, atol=1e-3)
    values = sitk.GetArrayFromImage(source)
    assert np.array_equal(sitk.GetArrayFromImage(written), values > 450)


@pytest.mark.parametrize("kind", WRITERS)
def test_slabs_are_the_volume(tmp_path, kind):
    array, affine = files.stored(POSITIVE[3] if kind == "minc2" else files.ORIENTATIONS[13])
    path = WRITERS[kind](tmp_path, array, affine)
    whole = read_volume(path)
    with open_scan(path, tmp_path) as scan:
        region = (slice(1, 6), slice(2, 9), slice(3, 13))
        assert np.array_equal(scan.read(region), whole.data[region])
        assert (scan.low, scan.high) == (whole.data.min(), whole.data.max())
        assert np.array_equal(scan.affine, whole.affine)


def test_rescaled_dicom_has_hounsfield_units(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    path = files.write_dicom(tmp_path / "ct", array, affine, slope=0.5, intercept=-1024)
    assert np.array_equal(read_volume(path).data, files.phantom() * 0.5 - 1024)


def test_one_file_of_a_series_stands_for_it(tmp_path):
    path = files.write_dicom(tmp_path / "ct", *files.stored(files.CANONICAL))
    one = sorted(path.iterdir())[4]
    assert np.array_equal(read_volume(one).data, files.phantom())


def test_several_series_are_listed_and_chosen(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    files.write_dicom(tmp_path / "ct", array, affine)
    files.write_dicom(tmp_path / "ct", array + 1, affine, uid="1.2.826.0.1.3680043.8.498.8", number=4)
    with pytest.raises(ValueError, match=r"2 DICOM series: 3 CT series 3 \(13 images\); 4 CT.*--series"):
        read_volume(tmp_path / "ct")
    assert np.array_equal(read_volume(tmp_path / "ct", series="4").data, files.phantom() + 1)
    assert np.array_equal(read_volume(f"{tmp_path / 'ct'}::1.2.826.0.1.3680043.8.498.7").data, files.phantom())
    with pytest.raises(ValueError, match="no series 9; it holds 3, 4"):
        read_volume(tmp_path / "ct", series="9")


def test_a_number_means_the_series_that_is_a_volume(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    files.write_dicom(tmp_path / "ct", array, affine)
    scout = {"uid": "1.2.826.0.1.3680043.8.498.9", "first_instance": 201}
    files.write_dicom(tmp_path / "ct", array + 1, affine, skip=(6, 7), **scout)
    assert np.array_equal(read_volume(tmp_path / "ct", series="3").data, files.phantom())
    with pytest.raises(ValueError, match=r"lacks about 2 slice"):
        read_volume(tmp_path / "ct", series=scout["uid"])
    files.write_dicom(tmp_path / "ct", array + 2, affine, uid="1.2.826.0.1.3680043.8.498.6", first_instance=401)
    with pytest.raises(ValueError, match="several series 3; give its UID"):
        read_volume(tmp_path / "ct", series="3")


def test_time_points_of_a_series_are_volumes(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    files.write_dicom(tmp_path / "ct", array, affine)
    files.write_dicom(tmp_path / "ct", array * 2, affine, first_instance=101)
    with pytest.raises(ValueError, match="--volume N"):
        read_volume(tmp_path / "ct")
    assert np.array_equal(read_volume(tmp_path / "ct", volume=0).data, files.phantom())
    assert np.array_equal(read_volume(tmp_path / "ct", volume=1).data, files.phantom() * 2)


def test_missing_slices_and_mixed_series_are_refused(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    with pytest.raises(ValueError, match=r"lacks about 2 slice\(s\), first between 19\.75 and 27\.25 mm"):
        read_volume(files.write_dicom(tmp_path / "gap", array, affine, skip=(6, 7)))
    files.write_dicom(tmp_path / "mixed", array, affine)
    files.write_dicom(tmp_path / "mixed", *files.stored(files.ORIENTATIONS[20]), first_instance=50)
    with pytest.raises(ValueError, match="mixes 2 image sizes or directions"):
        read_volume(tmp_path / "mixed")
    two = files.write_dicom(tmp_path / "two", array, affine)
    for file in sorted(two.iterdir())[:3]:
        (two / f"copy{file.name}").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="its positions have 1 to 2 images each"):
        read_volume(two)


def test_gantry_tilt_is_a_sheared_affine(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    affine[1, 2] = 0.3  # every slice is shifted by 0.3 mm
    volume = read_volume(files.write_dicom(tmp_path / "ct", array, affine))
    assert np.allclose(volume.affine, affine, atol=1e-4)
    assert any("gantry tilt" in note for note in volume.notes)


def test_truncated_images_and_missing_decoders_are_one_line(tmp_path):
    path = files.write_dicom(tmp_path / "ct", *files.stored(files.CANONICAL))
    one = sorted(path.iterdir())[4]
    whole = one.read_bytes()
    one.write_bytes(whole[:-60])
    with pytest.raises(ValueError, match=one.name):
        read_volume(path)
    import pydicom
    from pydicom.uid import UID

    one.write_bytes(whole)
    header = pydicom.dcmread(one)
    header.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.201")  # high-throughput JPEG 2000
    header["PixelData"].is_undefined_length = True
    header.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    header.save_as(one)
    with pytest.raises(ValueError, match=r"cannot be decoded \(transfer syntax High-Throughput JPEG 2000.*gdcmconv"):
        read_volume(path)


def test_an_enhanced_series_in_one_file(tmp_path):
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian

    array, affine = files.stored(files.CANONICAL)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = EnhancedCTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = "1.2.3.4"
    header.StudyInstanceUID, header.SeriesInstanceUID, header.SeriesNumber, header.Modality = "1.2.3", "1.2.5", 1, "CT"
    header.Rows, header.Columns, header.NumberOfFrames = array.shape[1], array.shape[0], array.shape[2]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [files.SPACING[1], files.SPACING[0]], files.SPACING[2]
    plane.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    transformation = Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = 1, 0, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [transformation]
    header.SharedFunctionalGroupsSequence = [shared]
    frames, order = [], [5, 0, 3, 1, 2, 4, 6, 12, 11, 10, 9, 8, 7]  # the frames lie in any order
    for k in order:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = (lps[:3, 3] + k * lps[:3, 2]).tolist()
        group.PlanePositionSequence = [place]
        frames.append(group)
    header.PerFrameFunctionalGroupsSequence = frames
    header.PixelData = np.ascontiguousarray(array[:, :, order].T.astype("<i2")).tobytes()
    path = tmp_path / "enhanced.dcm"
    header.save_as(path, enforce_file_format=True)
    volume = read_volume(path)
    assert np.array_equal(volume.data, files.phantom())
    assert np.allclose(volume.affine, files.canonical_affine(), atol=1e-4)
    assert isinstance(pydicom.dcmread(path), Dataset)


NIBABELS_FILES = Path(nib.__file__).parent / "tests" / "data"


@pytest.mark.parametrize(
    "name", ["tiny.mnc", "small.mnc", "minc1-no-att.mnc", "minc1_1_scale.mnc", "minc2-no-att.mnc", "minc2_1_scale.mnc"]
)
def test_minc_as_nibabel_reads_it(name):
    if not NIBABELS_FILES.exists():
        pytest.skip("nibabel came without its test data")
    path = NIBABELS_FILES / name
    volume, image = read_volume(path), nib.as_closest_canonical(nib.load(path))
    assert np.allclose(volume.data, image.get_fdata(), rtol=1e-6)
    assert np.allclose(volume.affine, image.affine)


@pytest.mark.parametrize("name", ["minc1_4d.mnc", "minc2_4d.mnc"])
def test_frames_of_minc_lie_along_its_first_axis(name):
    if not NIBABELS_FILES.exists():
        pytest.skip("nibabel came without its test data")
    path = NIBABELS_FILES / name
    with pytest.raises(ValueError, match=r"contains 2 volumes .* --volume"):
        read_volume(path)
    image, means = nib.load(path), []
    for number in range(2):
        volume = read_volume(path, volume=number)
        frame = nib.as_closest_canonical(nib.Nifti1Image(image.get_fdata()[number], image.affine))
        assert np.allclose(volume.data, frame.get_fdata(), rtol=1e-6) and np.allclose(volume.affine, frame.affine)
        means.append(float(volume.data.mean()))
    assert len(set(means)) == 2


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage, nib.Nifti1Pair])
@pytest.mark.parametrize("half", ["hdr", "img"])
def test_analyze_pairs(tmp_path, kind, half):
    orientation = files.ORIENTATIONS[30] if kind is nib.Nifti1Pair else np.array([[0, -1], [1, 1], [2, 1.0]])
    array, affine = files.stored(orientation)
    nib.save(kind(array.astype(np.int16), affine), tmp_path / "scan.img")
    volume = read_volume(tmp_path / f"scan.{half}")
    assert np.array_equal(volume.data, files.phantom())
    assert np.allclose(volume.spacing_mm, files.SPACING)
    if kind in (nib.Nifti1Pair, nib.Spm99AnalyzeImage):
        assert np.allclose(volume.affine, files.canonical_affine(), atol=1e-4)
    (tmp_path / f"scan.{'img' if half == 'hdr' else 'hdr'}").unlink()
    with pytest.raises(ValueError, match="other half"):
        read_volume(tmp_path / f"scan.{half}")


def test_several_frames_need_a_choice(tmp_path):
    array, affine = files.stored(files.CANONICAL)
    nib.save(nib.MGHImage(np.stack([array, array + 5], axis=-1), affine), tmp_path / "two.mgz")
    with pytest.raises(ValueError, match="contains 2 volumes"):
        read_volume(tmp_path / "two.mgz")
    assert np.array_equal(read_volume(tmp_path / "two.mgz", volume=1).data, files.phantom() + 5)
    image = sitk.JoinSeries([sitk.GetImageFromArray(array.T + n) for n in range(3)])
    sitk.WriteImage(image, str(tmp_path / "four.nrrd"))
    assert read_volume(tmp_path / "four.nrrd", volume=2).data.max() == 1002
    vector = sitk.Compose([sitk.GetImageFromArray(array.T + n) for n in range(2)])
    sitk.WriteImage(vector, str(tmp_path / "vector.mha"))
    with pytest.raises(ValueError, match="contains 2 volumes"):
        read_volume(tmp_path / "vector.mha")
    assert read_volume(tmp_path / "vector.mha", volume=1).data.max() == 1001


DAMAGED = ["scan.nrrd", "scan.mha", "scan.mgz", "scan.mnc", "scan.mgh"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["truncated", "header only", "empty", "web page", "git lfs", "noise"])
def test_damaged_files_are_one_line(tmp_path, name, damage):
    path = tmp_path / name
    array, affine = files.stored(files.CANONICAL)
    write = {"nrrd": files.write_sitk, "mha": files.write_sitk, "mnc": files.write_minc2}.get(
        path.suffix[1:], files.write_mgh
    )
    write(path, array, affine)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[:-200],
            "header only": whole[:290],
            "empty": b"",
            "web page": b"<!DOCTYPE html><html><body>404</body></html>" * 20,
            "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "noise": np.random.default_rng(0).bytes(len(whole)),
        }[damage]
    )
    with pytest.raises(ValueError, match=name) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value) and type(caught.value).__name__ == "InputError"


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    import sys

    path = files.write_sitk(tmp_path / "scan.nrrd", *files.stored(files.CANONICAL))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with (
        pytest.raises(ValueError, match=r'needs SimpleITK: pip install "diffdiscover3d\[medical\]"'),
        open_volume(path),
    ):
        pass
