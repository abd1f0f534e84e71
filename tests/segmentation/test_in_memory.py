"""Segment files through Python, and bad files through the command line."""

import hashlib
import json
import os
import struct
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from diffdiscover3d import __version__
from diffdiscover3d.cli import app as cli
from diffdiscover3d.data.formats.registry import stem
from diffdiscover3d.errors import InputError, MemoryLimitError, ModelError, NetworkError, OutputError
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.segmentation import files as module
from diffdiscover3d.segmentation import in_memory
from diffdiscover3d.segmentation import scan as scan_module
from diffdiscover3d.segmentation.driver import choose_device, segment
from tests.helpers.corpus import CORPUS, SHAPE, blobs

OBLIQUE = np.array([[0, -1.9, 0.3, 30.0], [0, 0.4, 2.9, -12.0], [-1.5, 0, 0, 44.0], [0, 0, 0, 1]])


def names(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def scan(tmp_path, make_nifti):
    def mod(header):
        header.set_xyzt_units("mm", "sec")

    return make_nifti(tmp_path / "in" / "scan.nii.gz", blobs().astype(np.int16), OBLIQUE, mod)


def world_labels(path) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


# what is written


def test_result_lies_on_the_input(scan, tiny_discovery):
    before = scan.read_bytes()
    (result,) = segment(scan, beside_inputs=True, model=str(tiny_discovery), device="cpu", preview=True)
    assert names(scan.parent) == [
        "scan.nii.gz",
        *(f"scan_dseg.{end}" for end in ("json", "nii.gz", "png", "tsv")),
    ]
    assert scan.read_bytes() == before
    assert result.labels == scan.parent / "scan_dseg.nii.gz" and result.input == scan

    source, labels = nib.load(scan), nib.load(result.labels)
    assert labels.shape == SHAPE and labels.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(labels.affine, source.affine)
    for field in ("sform_code", "qform_code", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(labels.header[field], source.header[field], err_msg=field)
    assert labels.header["intent_code"] == 1002

    from diffdiscover3d.hub.registry import load_discovery

    canonical = nib.as_closest_canonical(source).get_fdata(dtype=np.float32)
    expected = load_discovery(str(tiny_discovery)).segment(torch.from_numpy(canonical)).labels[0].numpy()
    assert len(np.unique(expected)) > 1  # otherwise equal labels would prove nothing
    np.testing.assert_array_equal(world_labels(result.labels), expected)

    fractions = np.bincount(expected.ravel(), minlength=3) / expected.size
    np.testing.assert_allclose(result.fractions, fractions)
    sidecar = json.loads(result.sidecar.read_text())
    assert sidecar["diffdiscover3d"] == __version__
    digest = hashlib.sha256(before).hexdigest()
    expected = {"name": "scan.nii.gz", "sha256": digest, "shape": list(SHAPE), "unit": "mm"}
    assert {k: v for k, v in sidecar["input"].items() if k != "voxel_size"} == expected
    np.testing.assert_allclose(
        sidecar["input"]["voxel_size"], nib.affines.voxel_sizes(nib.load(scan).affine), rtol=1e-5
    )
    (weights,) = tiny_discovery.glob("*.safetensors")
    assert sidecar["model"]["sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert sidecar["model"]["id"] == tiny_discovery.name  # no local path
    assert [p["index"] for p in sidecar["parts"]] == [0, 1, 2]
    np.testing.assert_allclose([p["fraction"] for p in sidecar["parts"]], fractions, atol=1e-6)
    reading = {"volume": None, "nan_to_zero": False, "ignore_affine": False}
    assert sidecar["arguments"] == {"device": "cpu", **reading, "fast": False, "order": "model", "statistics": False}
    assert sidecar["seconds"] > 0 and sidecar["peak_memory_mib"] > 0

    with Image.open(result.preview) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 100
        assert len(set(picture.convert("RGB").resize((60, 30)).getdata())) > 20


def test_second_run_writes_the_same_labels(scan, tiny_discovery):
    (first,) = segment(scan, beside_inputs=True, model=str(tiny_discovery))
    once = first.labels.read_bytes()
    assert first.preview is None
    segment(scan, beside_inputs=True, model=str(tiny_discovery), overwrite=True)
    assert first.labels.read_bytes() == once


def test_labels_do_not_depend_on_encoding_or_axis_order(tmp_path, make_nifti, tiny_discovery):
    values, affine = blobs(), np.diag([2.0, 2.0, 3.0, 1.0])
    make_nifti(tmp_path / "f4.nii.gz", values.astype(np.float32), affine)
    make_nifti(tmp_path / "f8.nii", values.astype(np.float64), affine)
    make_nifti(tmp_path / "i2.nii.gz", values.astype(np.int16), affine)
    make_nifti(tmp_path / "two.nii", values.astype(np.float32), affine, kind=nib.Nifti2Image)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(values.astype(">i2"), affine, header), tmp_path / "big.nii.gz")
    scaled = make_nifti(tmp_path / "scaled.nii", (2 * (values + 3)).astype(np.int16), affine)
    raw = bytearray(scaled.read_bytes())
    struct.pack_into("<ff", raw, 112, 0.5, -3)  # a stored v means v / 2 - 3
    scaled.write_bytes(raw)
    turned = nib.Nifti1Image(values.astype(np.float32), affine).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    results = segment(tmp_path, tmp_path / "out", model=str(tiny_discovery))
    maps = {r.input.name: world_labels(r.labels) for r in results}
    assert len(maps) == 7 and nib.load(tmp_path / "out" / "turned_dseg.nii.gz").shape == turned.shape != SHAPE
    for name, labels in maps.items():
        np.testing.assert_array_equal(labels, maps["f4.nii.gz"], err_msg=name)


def test_notes_and_choices_reach_the_sidecar(tmp_path, make_nifti, tiny_discovery):
    volumes = np.stack([blobs(), blobs()[::-1]], axis=-1).astype(np.float32)
    volumes[0, 0, 0, 1] = np.nan
    path = make_nifti(tmp_path / "four.nii.gz", volumes)
    (result,) = segment(path, beside_inputs=True, model=str(tiny_discovery), volume=1, nan_to_zero=True)
    sidecar = json.loads(result.sidecar.read_text())
    assert sidecar["notes"] == list(result.notes) and len(result.notes) == 2
    assert sidecar["arguments"]["volume"] == 1 and sidecar["arguments"]["nan_to_zero"] is True
    assert nib.load(result.labels).shape == SHAPE


# what is never overwritten


def test_existing_results_are_refused_without_overwrite(scan, tiny_discovery):
    for name in ("scan_dseg.nii.gz", "scan_dseg.json", "scan_dseg.png"):
        old = scan.parent / name
        old.write_bytes(b"old")
        with pytest.raises(OutputError, match=rf"{name}: already exists; use --overwrite"):
            segment(scan, beside_inputs=True, model=str(tiny_discovery), preview=True)
        assert old.read_bytes() == b"old" and names(scan.parent) == ["scan.nii.gz", name]
        old.unlink()


def test_overwrite_replaces_all(scan, tiny_discovery):
    targets = [scan.parent / f"scan_dseg.{ending}" for ending in ("nii.gz", "json", "png")]
    for target in targets:
        target.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"scan_dseg\.nii\.gz: was not made by diffdiscover3d"):
        segment(scan, beside_inputs=True, model=str(tiny_discovery), preview=True, overwrite=True)
    assert all(target.read_bytes() == b"old" for target in targets)
    targets[1].write_bytes(b'{"diffdiscover3d": "0.0"}')  # a sidecar of an earlier version
    segment(scan, beside_inputs=True, model=str(tiny_discovery), preview=True, overwrite=True)
    assert all(target.read_bytes() not in (b"old", b'{"diffdiscover3d": "0.0"}') for target in targets)


@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_the_input_itself_is_never_overwritten(scan, tiny_discovery, make_link):
    make_link(scan, scan.parent / "scan_dseg.nii.gz")
    before = scan.read_bytes()
    with pytest.raises(OutputError, match="is the input itself"):
        segment(scan, beside_inputs=True, model=str(tiny_discovery), overwrite=True)
    assert scan.read_bytes() == before


def test_another_input_is_never_overwritten(scan, tiny_discovery):
    other = scan.parent / "scan_dseg.nii.gz"
    other.write_bytes(scan.read_bytes())
    with pytest.raises(OutputError, match=r"scan_dseg\.nii\.gz: is one of the inputs"):
        options = {"overwrite": True, "include": ["*_dseg*"], "beside_inputs": True}
        segment(f"{scan.parent}/*.nii.gz", model=str(tiny_discovery), **options)
    assert other.read_bytes() == scan.read_bytes()


def test_two_inputs_of_one_stem(tmp_path, make_nifti, tiny_discovery):
    one = make_nifti(tmp_path / "a" / "scan.nii.gz", blobs().astype(np.int16))
    two = make_nifti(tmp_path / "b" / "scan.nii", blobs().astype(np.int16))
    found = segment([one, two], tmp_path / "out", model=str(tiny_discovery))  # their folders tell them apart
    assert [str(r.labels.relative_to(tmp_path / "out")) for r in found] == ["a/scan_dseg.nii.gz", "b/scan_dseg.nii.gz"]
    same = make_nifti(tmp_path / "a" / "scan.nii", blobs().astype(np.int16))
    with pytest.raises(OutputError, match=r"would both write.*two output folders"):
        segment([one, same], tmp_path / "new", model=str(tiny_discovery))
    assert not (tmp_path / "new").exists()
    assert (
        len(segment([one, two], beside_inputs=True, model=str(tiny_discovery))) == 2
    )  # beside their inputs the names do not clash


def test_output_folder_is_made_and_may_lie_deep(scan, tmp_path, tiny_discovery):
    segment([scan], tmp_path / "new" / "deep", model=str(tiny_discovery))
    assert names(tmp_path / "new" / "deep") == ["scan_dseg.json", "scan_dseg.nii.gz", "scan_dseg.tsv"]
    assert names(scan.parent) == ["scan.nii.gz"]


def test_output_folder_that_is_a_file_is_found_first(scan, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is not a folder; choose another"):
        segment(scan, tmp_path / "file" / "out", model="/no/model")  # before a model is looked for


# failures


def test_folder_with_a_bad_file(tmp_path, make_nifti, tiny_discovery):
    for name in ("a", "c"):
        make_nifti(tmp_path / "in" / f"{name}.nii.gz", blobs().astype(np.int16))
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"<html>")
    errors, done = [], []
    results = segment(
        tmp_path / "in", tmp_path / "out", model=str(tiny_discovery), on_done=done.append, on_error=errors.append
    )
    assert [r.input.name for r in results] == ["a.nii.gz", "c.nii.gz"] and done == results
    (error,) = errors
    assert isinstance(error, InputError) and "b.nii.gz" in str(error)
    assert names(tmp_path / "out") == [f"{x}_dseg.{end}" for x in "ac" for end in ("json", "nii.gz", "tsv")]
    with pytest.raises(InputError, match=r"b\.nii\.gz"):
        segment(tmp_path / "in", tmp_path / "again", model=str(tiny_discovery))


def test_no_model_stops_at_once(tmp_path, make_nifti, monkeypatch):
    for name in ("a", "b"):
        make_nifti(tmp_path / f"{name}.nii.gz", blobs().astype(np.int16))
    errors, asked = [], []
    with pytest.raises(ModelError, match="no such folder"):
        segment(tmp_path, tmp_path / "out", model="/no/model", on_error=errors.append)

    def offline(*_):
        asked.append(1)
        raise NetworkError("offline")

    monkeypatch.setattr(module, "resolve_model", offline)
    with pytest.raises(NetworkError):
        segment(tmp_path, tmp_path / "out", model="user/name", on_error=errors.append)
    assert asked == [1] and errors == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("place", "step"),
    [
        (in_memory, "label_map"),
        (scan_module, "write_part_table"),
        (scan_module, "save_cuts"),
        (scan_module, "write_json"),
    ],
)
@pytest.mark.parametrize("error", [OutputError("full"), KeyboardInterrupt(), RuntimeError("bug")])
def test_no_label_map_is_left_behind(scan, tmp_path, tiny_discovery, monkeypatch, overwrite, place, step, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(place, step, fail)
    with pytest.raises(type(error)):
        segment(scan, tmp_path / "out", model=str(tiny_discovery), preview=True, overwrite=overwrite)
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


def test_a_failed_run_keeps_older_results(scan, tmp_path, tiny_discovery):
    segment(scan, tmp_path / "out", model=str(tiny_discovery))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    scan.write_bytes(scan.read_bytes()[:300])
    with pytest.raises(InputError, match="copy it again"):
        segment(scan, tmp_path / "out", model=str(tiny_discovery), overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_progress_is_reported_and_can_end_the_work(scan, tmp_path, tiny_discovery):
    calls = []
    segment(scan, tmp_path / "out", model=str(tiny_discovery), on_progress=lambda *call: calls.append(call))
    shares, operations = zip(*calls, strict=True)
    assert shares[0] == 0 and shares[-1] == 1 and list(shares) == sorted(shares)
    assert list(dict.fromkeys(operations)) == [
        "reading the scan",
        "loading the model",
        "finding the parts",
        "writing the results",
    ]
    for last in range(len(calls)):
        left = iter(range(last))

        def stop(share, operation, left=left):
            if next(left, None) is None:
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            segment(scan, tmp_path / "stopped", model=str(tiny_discovery), on_progress=stop)
        assert not (tmp_path / "stopped").exists() or names(tmp_path / "stopped") == [], last


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_file(scan, tmp_path, tiny_discovery, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(StructureDiscoveryModel, "segment", fail)
    with pytest.raises(MemoryLimitError, match=r"scan\.nii\.gz.*does not fit.*resample") as caught:
        segment(scan, tmp_path / "out", model=str(tiny_discovery))
    assert caught.value.exit_code == 7 and not (tmp_path / "out").exists()


def test_other_runtime_errors_are_not_called_memory(scan, tiny_discovery, monkeypatch):
    def fail(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(StructureDiscoveryModel, "segment", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        segment(scan, beside_inputs=True, model=str(tiny_discovery))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(ValueError, match="device"):
            choose_device(name)


def test_stem(tmp_path):
    assert stem(tmp_path / "sub-01.v2.nii.gz") == "sub-01.v2"
    assert stem(tmp_path / "a.nii") == "a"


# bad files through the command line


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")  # outside pytest they are lines on stderr
@pytest.mark.parametrize("name", CORPUS)
def test_corpus(tmp_path, tiny_discovery, monkeypatch, capfd, name):
    write, expected = CORPUS[name]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    write(path)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["segment", str(path), "--model", str(tiny_discovery), "--output", str(out), "--preview"]
    monkeypatch.setattr(sys, "argv", ["diffdiscover3d", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code or 0
    errors = capfd.readouterr().err
    assert code == expected, errors
    if expected == 0:
        assert all(line.startswith(f"{path}: note: ") for line in errors.splitlines()), errors
        assert names(out) == [f"{stem(path)}_dseg.{ending}" for ending in ("json", "nii.gz", "png", "tsv")]
        labels = nib.load(out / f"{stem(path)}_dseg.nii.gz")
        assert labels.shape == nib.load(path).shape[:3]
        np.testing.assert_array_equal(labels.affine, nib.load(path).affine)
    else:
        check_refusal(errors, path, out)


def check_refusal(errors, path, out):
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and str(path) in line and "Traceback" not in errors
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["missing.nii.gz", "trunc.nii", "d4_time.nii.gz"])
def test_corpus_in_a_process_of_its_own(tmp_path, tiny_discovery, name):
    write, expected = CORPUS[name]
    path, out = tmp_path / name, tmp_path / "out"
    write(path)
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "diffdiscover3d.cli", "segment", path, "--model", tiny_discovery, "--output", out],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expected and done.stdout == ""
    check_refusal(done.stderr, path, out)


def test_several_inputs_go_on_after_a_bad_one(tmp_path, make_nifti, tiny_discovery, monkeypatch, capsys):
    for name in ("a", "c"):
        make_nifti(tmp_path / f"{name}.nii.gz", blobs().astype(np.int16))
    (tmp_path / "b.nii.gz").write_bytes(b"<html>")
    everything = [f"{x}_dseg.{end}" for x in "ac" for end in ("json", "nii.gz", "tsv")]
    (tmp_path / "list.txt").write_text("a.nii.gz\nb.nii.gz\nc.nii.gz\n")
    files = [str(tmp_path / f"{name}.nii.gz") for name in "abc"]
    for i, inputs in enumerate((files, [f"{tmp_path}/*.nii.gz"], [str(tmp_path)], [str(tmp_path / "list.txt")])):
        out = tmp_path / f"out{i}"
        arguments = ["segment", *inputs, "--model", str(tiny_discovery), "-o", str(out)]
        monkeypatch.setattr(sys, "argv", ["diffdiscover3d", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert caught.value.code == 3 and line.startswith("error: ") and "b.nii.gz" in line
        assert names(out) == everything and len(printed.out.splitlines()) == 2
        for name in everything:  # otherwise the next input, the folder, would contain it
            (out / name).unlink()
