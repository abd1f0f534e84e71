"""The authors' pickled archive: arrays are read unchanged, and no code is executed."""

import collections
import os
import pickle
import struct
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.datasets.authors_archive import (
    import_archive,
    list_archive,
    read_archive_volume,
    read_pickled_array,
)
from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.errors import InputError


def make_archive(root, count=2, shape=(7, 6, 5)):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for i in range(count):
            files = {"im": rng.normal(size=shape)}
            files |= {f"truth_{n}": rng.integers(0, k, shape) for n, k in (("bg", 2), ("sc", 4), ("all", 8))}
            for name, array in files.items():
                (root / split / f"{name}_{i}.p").write_bytes(pickle.dumps(array, protocol=2))
    return root


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", ">i2", "u1", "?", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol(tmp_path, protocol, dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 7, dtype=dtype, order=order)
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps(array, protocol=protocol))
    found = read_pickled_array(path)
    np.testing.assert_array_equal(found, array)
    assert found.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")  # NumPy may swap them when it reads


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.answer = (function, arguments)

    def __reduce__(self):
        return self.answer


def object_array(thing):
    array = np.empty(2, dtype=object)
    array[:] = [thing, thing]
    return array


def hostile_pickles(marker):
    yield "system", pickle.dumps(Call(os.system, f"touch {marker}"))
    yield "eval", pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"))
    yield "in a list", pickle.dumps([np.zeros(3), Call(os.system, f"touch {marker}")])
    yield "in an object array", pickle.dumps(object_array(Call(os.system, f"touch {marker}")))
    yield "getattr", b"cbuiltins\ngetattr\n(cos\nS'system'\ntR."
    yield "numpy's own loader", pickle.dumps(Call(np.load, str(marker)))
    yield "numpy's tofile by name", b"cnumpy\nndarray.tofile\n."
    yield "numpy's memmap", b"\x80\x02cnumpy\nmemmap\nX\x04\x00\x00\x00evil\x85R."
    yield "a submodule by dots", b"\x80\x04\x8c\x05numpy\x8c\x0elib.npyio.load\x93."
    yield "setting attributes", b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}X\x01\x00\x00\x00ai\x86b."
    yield "persistent id", b"Pevil\n."
    yield "extension", b"\x82\x01."
    yield "another codec", b"c_codecs\nencode\n(V./evil\nVrot13\ntR."
    yield "huge array", pickle.dumps(Call(np.ndarray, (10**6, 10**6, 10**6)))
    yield "huge reconstruct", b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000\nI1000000\ntS'b'\ntR."
    yield "huge promise", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."
    yield "object dtype", pickle.dumps(np.array([None, 1], dtype=object))
    yield "record dtype", pickle.dumps(np.zeros(3, dtype=[("a", "f4")]))
    yield "strings", pickle.dumps(np.array(["a", "b"]))
    yield "a dict", pickle.dumps({"a": np.zeros(3)})
    yield "a counter", pickle.dumps(collections.Counter("ab"))
    yield "a number", pickle.dumps(3.5)
    yield "cut short", pickle.dumps(np.zeros((5, 5)))[:-40]
    yield "nothing", b""
    yield "no pickle", b"<html>404</html>"
    yield "deep nesting", b"(" * 100_000 + b"."


CASES = [name for name, _ in hostile_pickles("x")]


@pytest.mark.parametrize("case", CASES)
def test_hostile_pickles_are_refused_unexecuted(tmp_path, case):
    marker = tmp_path / "executed"
    path = tmp_path / "im_0.p"
    path.write_bytes(dict(hostile_pickles(marker))[case])
    with pytest.raises(InputError) as caught:
        read_pickled_array(path)
    assert not marker.exists() and str(path) in str(caught.value) and "\n" not in str(caught.value)


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


DTYPE = b"\x80\x05cnumpy\ndtype\n(" + short("i8") + b"\x89\x88tR"  # dtype("i8", False, True)
PLAIN = b"(K\x03" + short("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
SUBARRAY = b"(K\x03" + short("<") + DTYPE[2:] + b"J\x00\x00\x00\x10\x85\x86NNJ\x08\x00\x00\x00K\x01K\x00tb"
BUFFER = b"\x96" + struct.pack("<Q", 64) + bytes(64)
FROMBUFFER = b"\x80\x05cnumpy._core.numeric\n_frombuffer\n("
EMPTY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
FAR = b"J\x00\x00\x00\x10"
FAR_ELEMENT = b"K\x07J\xff\xff\xff\x0f\x86K\x01s"
MADE = FROMBUFFER + BUFFER + DTYPE[2:]
FILLED = b"\x89C\x08" + bytes(8) + b"tb."
OVERRUNS = {
    "writing by a subarray type": MADE + SUBARRAY + b"K\x08" + FAR + b"\x86" + short("C") + b"tR" + FAR_ELEMENT + b".",
    "a state of a subarray type": b"\x80\x05" + EMPTY + b"(K\x01K\x01\x85" + DTYPE[2:] + SUBARRAY + FILLED,
    "writing far away": MADE + PLAIN + b"K\x08\x85" + short("C") + b"tR" + FAR + b"K\x01s.",
    "a shape beyond the buffer": MADE + PLAIN + FAR + b"\x85" + short("C") + b"tR.",
    "a negative shape": MADE + PLAIN + b"J\xff\xff\xff\xff\x85" + short("C") + b"tR.",
    "a state beyond its bytes": b"\x80\x05" + EMPTY + b"(K\x01" + FAR + b"\x85" + DTYPE[2:] + PLAIN + FILLED,
    "no state": b"\x80\x05" + EMPTY + b".",
}
READ = """
import sys
from diffdiscover3d.data.datasets.authors_archive import read_pickled_array
from diffdiscover3d.errors import InputError
for path in sys.argv[1:]:
    try:
        print("read", read_pickled_array(path).sum())
    except InputError as error:
        print("refused", error)
"""


@pytest.mark.parametrize("case", OVERRUNS)
def test_no_pickle_leads_numpy_beyond_a_buffer(tmp_path, case):
    """Runs in a subprocess, because NumPy could crash; the same bytes with a valid shape are read."""
    (tmp_path / "bad.p").write_bytes(OVERRUNS[case])
    good = FROMBUFFER + BUFFER + DTYPE[2:] + PLAIN + b"K\x08\x85" + short("C") + b"tR."
    (tmp_path / "good.p").write_bytes(good)
    paths = [str(tmp_path / name) for name in ("bad.p", "good.p")]
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    bad, good = done.stdout.splitlines()
    assert bad.startswith("refused") and "not executed" in bad and good == "read 0"


def test_a_refused_pickle_leaves_nothing_behind(tmp_path):
    """State set by one pickle must not affect how the next one is read."""
    good = tmp_path / "good.p"
    good.write_bytes(pickle.dumps(np.arange(6.0).reshape(2, 3), protocol=2))
    for name, payload in hostile_pickles(tmp_path / "x"):
        (tmp_path / "bad.p").write_bytes(payload)
        with pytest.raises(InputError):
            read_pickled_array(tmp_path / "bad.p")
        np.testing.assert_array_equal(read_pickled_array(good), np.arange(6.0).reshape(2, 3), err_msg=name)
    assert np.dtype("f8").isnative


def test_the_archive_becomes_nifti_files(tmp_path):
    root = make_archive(tmp_path / "archive")
    assert list_archive(root) == {"train": [0, 1], "test": [0, 1]}
    paths = import_archive(root, tmp_path / "out")
    assert len(paths) == 4 and list_volumes(tmp_path / "out") == sorted(paths)
    for i in range(2):
        volume, labels = read_archive_volume(root, "test", i)
        image = nib.load(tmp_path / "out" / "test" / f"im_{i}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume)
        with open(root / "test" / f"im_{i}.p", "rb") as file:  # the test's own file: safe to load
            np.testing.assert_array_equal(volume, pickle.load(file).astype(np.float32))
        for level in (1, 2, 3):
            label = nib.load(tmp_path / "out" / "test" / f"im_{i}_level-{level}_dseg.nii.gz")
            np.testing.assert_array_equal(np.asarray(label.dataobj), labels[level - 1])


def test_incomplete_archives_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no train/im_\*\.p"):
        list_archive(tmp_path)
    root = make_archive(tmp_path / "archive")
    (root / "test" / "truth_sc_1.p").write_bytes(pickle.dumps(np.full((7, 6, 5), 0.5)))
    with pytest.raises(InputError, match="truth_sc_1"):
        read_archive_volume(root, "test", 1)
    (root / "test" / "truth_sc_1.p").unlink()
    with pytest.raises(InputError, match=r"im_1\.p has no truth_sc_1\.p"):
        import_archive(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
