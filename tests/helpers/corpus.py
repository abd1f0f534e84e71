"""Valid, unusual and invalid files with the expected exit code of the command line."""

import gzip
import struct

import nibabel as nib
import numpy as np

SHAPE = (12, 14, 10)


def blobs(shape=SHAPE) -> np.ndarray:
    """Integers, which every encoding can represent."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(0).normal(0, 20, shape)
    return np.round(1000 * np.exp(-3 * ((x - 0.2) ** 2 + y**2 + (z + 0.3) ** 2)) + 300 * (x > 0.4) + noise + 100)


def float_file() -> bytearray:
    return bytearray(nib.Nifti1Image(blobs().astype(np.float32), np.diag([2.0, 2.0, 3.0, 1.0])).to_bytes())


def array(values, affine=None):
    """Return a writer of an array as a NIfTI file."""

    def write(path):
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)

    return write


def patch(offset, layout, *values):
    """Return a writer of a valid file with modified header bytes."""

    def write(path):
        raw = float_file()
        struct.pack_into(layout, raw, offset, *values)
        path.write_bytes(gzip.compress(bytes(raw)))

    return write


def content(make):
    """Return a writer of bytes derived from a valid file."""

    def write(path):
        path.write_bytes(make(bytes(float_file())))

    return write


def with_voxel(value):
    out = blobs().astype(np.float32)
    out[3, 3, 3] = value
    return out


def flip_middle(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


def scaled(path):
    image = nib.Nifti1Image((blobs() * 10).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.1, -3)
    nib.save(image, path)


def big_endian(path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">f4")
    nib.save(nib.Nifti1Image(blobs().astype(">f4"), np.diag([2.0, 2.0, 3.0, 1.0]), header), path)


F4 = blobs().astype(np.float32)
NAN, INF = float("nan"), float("inf")
# file name: (writer, exit code)
CORPUS = {
    # usual
    "good.nii.gz": (array(F4), 0),
    "café 大.nii.gz": (array(F4), 0),
    "with [1] brackets.nii.gz": (array(F4), 0),
    "sub-01.v2.nii": (array(F4), 0),
    "u16.nii.gz": (array(F4.astype(np.uint16)), 0),
    "f64.nii.gz": (array(F4.astype(np.float64)), 0),
    "bigendian.nii.gz": (big_endian, 0),
    "slope.nii.gz": (scaled, 0),
    "las.nii.gz": (array(F4, np.diag([-2.0, 2.0, 3.0, 1.0])), 0),
    "eight.nii.gz": (array(F4[3:11, 4:12, 1:9]), 0),
    "garbage_after.nii.gz": (content(lambda raw: gzip.compress(raw) + b"garbage"), 0),
    "tiny.nii.gz": (array(F4[3:6, 4:7, 5:8]), 0),
    "thin.nii.gz": (array(F4[:, :2, :]), 0),
    "d4_singleton.nii.gz": (array(F4[..., None]), 0),
    # unusual geometry and scaling, with a note
    "codes0.nii.gz": (patch(252, "<hh", 0, 0), 0),
    "shear.nii.gz": (patch(280, "<12f", 2, 1, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0), 0),
    "slope_zero.nii.gz": (patch(112, "<ff", 0, 0), 0),
    "slope_inf.nii.gz": (patch(112, "<ff", INF, 0), 0),
    "slope_nan.nii.gz": (patch(112, "<ff", NAN, 0), 0),
    "pixdim_zero.nii.gz": (patch(76, "<8f", 1, 0, 0, 0, 0, 0, 0, 0), 0),
    "pixdim_nan.nii.gz": (patch(76, "<8f", 1, NAN, 1, 1, 0, 0, 0, 0), 0),
    "pixdim_neg.nii.gz": (patch(76, "<8f", 1, -2, 2, 3, 0, 0, 0, 0), 0),
    # not scans
    "d4_time.nii.gz": (array(np.stack([F4] * 3, -1)), 3),
    "d5.nii.gz": (array(F4[..., None, None].repeat(3, -1)), 3),
    "d2.nii.gz": (array(F4[:, :, 0]), 3),
    "z1.nii.gz": (array(F4[:, :, :1]), 3),
    "nan.nii.gz": (array(with_voxel(NAN)), 3),
    "inf.nii.gz": (array(with_voxel(INF)), 3),
    "overflow.nii.gz": (array(np.where(F4 > 500, np.float32(3e38), np.float32(-3e38))), 3),
    "allnan.nii.gz": (array(np.full_like(F4, NAN)), 3),
    "const.nii.gz": (array(np.full_like(F4, 7)), 3),
    "zeros.nii.gz": (array(np.zeros(SHAPE, np.int16)), 3),
    "cplx.nii.gz": (array(F4.astype(np.complex64)), 3),
    "rgb.nii.gz": (array(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), 3),
    # damaged headers
    "empty_dim.nii.gz": (patch(40, "<8h", 3, 0, 14, 10, 1, 1, 1, 1), 3),
    "dim_huge.nii.gz": (patch(40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), 3),
    "dim_neg.nii.gz": (patch(40, "<8h", 3, -12, 14, 10, 1, 1, 1, 1), 3),
    "dim0_bad.nii.gz": (patch(40, "<h", 9), 3),
    "dim0_zero.nii.gz": (patch(40, "<h", 0), 3),
    "dtype_bad.nii.gz": (patch(70, "<h", 999), 3),
    "bitpix_bad.nii.gz": (patch(72, "<h", 8), 0),  # determined by the data type, so it can be corrected
    "voxoff_bad.nii.gz": (patch(108, "<f", 1e9), 3),
    "voxoff_small.nii.gz": (patch(108, "<f", 100), 3),
    "voxoff_nan.nii.gz": (patch(108, "<f", NAN), 3),
    "magic_bad.nii.gz": (patch(344, "<4s", b"XXXX"), 3),
    "sform_zero.nii.gz": (patch(280, "<12f", *[0] * 12), 3),
    "sform_nan.nii.gz": (patch(280, "<12f", NAN, 1, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0), 3),
    "quatern_bad.nii.gz": (patch(252, "<hh3f", 1, 0, 5, 5, 5), 3),
    # damaged files
    "header_only.nii.gz": (content(lambda raw: gzip.compress(raw[:352])), 3),
    "trunc_raw.nii.gz": (content(lambda raw: gzip.compress(raw[:2000])), 3),
    "trunc.nii": (content(lambda raw: raw[:2000]), 3),
    "trunc_gz.nii.gz": (content(lambda raw: gzip.compress(raw)[:1500]), 3),
    "crc.nii.gz": (content(lambda raw: flip_middle(gzip.compress(raw))), 3),
    "empty.nii.gz": (content(lambda raw: b""), 3),
    "zero_payload.nii.gz": (content(lambda raw: gzip.compress(b"")), 3),
    "notgz.nii.gz": (content(lambda raw: raw), 3),
    "html.nii.gz": (content(lambda raw: b"<html>404 Not Found</html>"), 3),
    "lfs.nii.gz": (content(lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"), 3),
    "random.nii.gz": (content(lambda raw: np.random.default_rng(0).bytes(5000)), 3),
    # not NIfTI files
    "missing.nii.gz": (lambda p: None, 3),
    "missing": (lambda p: None, 3),
    "img.txt": (content(lambda raw: b"x"), 3),
    "prose.txt": (content(lambda raw: b"word " * 3000), 3),
    "noending": (content(lambda raw: raw), 3),
    "photo.jpg": (content(lambda raw: b"\xff\xd8\xff\xe0" + bytes(200)), 3),
    "folder.nii.gz": (lambda p: p.mkdir(), 3),
}
