"""Streaming writer against nibabel's writer."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.formats.nifti.output import nifti_stream, output_header
from diffdiscover3d.errors import OutputError


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_against_nibabel(tmp_path, kind, order, dtype):
    values = np.random.default_rng(0).integers(0, 900, (7, 5, 4, 3)).astype(dtype)
    source = kind(values, np.diag([2, 3, -4, 1]), kind.header_class(endianness=order)).header
    header = output_header(source, np.dtype(dtype), values.shape, labels=False)
    for ending in ("nii", "nii.gz"):
        with nifti_stream(tmp_path / f"a.{ending}", header) as write:
            for volume in np.moveaxis(values, -1, 0):
                write(volume[..., :1])
                write(volume[..., 1:])
        with nifti_stream(tmp_path / f"whole.{ending}", header) as write:
            write(values)
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    plain = (tmp_path / "a.nii").read_bytes()
    assert plain == kind(values, None, header).to_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == plain
    assert (tmp_path / "a.nii.gz").read_bytes()[3:8] == bytes(5)  # no file name and time stamp
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj), values)


def test_an_error_leaves_what_was_there(tmp_path):
    header = output_header(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header, np.uint8, (2, 2, 2), True)
    (tmp_path / "a.nii.gz").write_bytes(b"old")
    with pytest.raises(OutputError, match="full"), nifti_stream(tmp_path / "a.nii.gz", header) as write:
        write(np.zeros((2, 2, 1), np.uint8))
        raise OSError(28, "full")
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"] and (tmp_path / "a.nii.gz").read_bytes() == b"old"
