"""Safe reader of the authors' pickled synthetic cells.

The archive contains `{train,test}/im_{i}.p` and the labels `truth_{bg,sc,all}_{i}.p` of levels 1, 2 and 3. Unpickling
can execute arbitrary code, so this reader uses a restricted unpickler that resolves only the names needed to rebuild a
numeric NumPy array, and replaces them by its own classes. NumPy receives the data only after dtype, shape and length
have been checked.
"""

import io
import math
import pickle
import re
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import write_volume
from diffdiscover3d.errors import InputError, first_line
from diffdiscover3d.utils.files import check_targets

LABELS = {1: "truth_bg", 2: "truth_sc", 3: "truth_all"}  # by level of the hierarchy
SPLITS = ("train", "test")
_MAX_BYTES = 256 * 2**20  # volumes of the archive have about 1 MB
_MAX_DIMS = 4  # three spatial axes and a channel axis
_CODES = ("b1", "?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_IMAGE = re.compile(r"im_(\d+)\.p")


# Replacements for NumPy's classes. A pickle can call `__setstate__` of any object, and NumPy's does not validate sizes.
# The unpickler returns instances with slots, which cannot be subclassed or given attributes.


class _NDArray:
    __slots__ = ()


class _DType:
    """Replacement for a numeric dtype; its state contains the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        if type(state) is not tuple or state[:1] != (3,) or state[2:] != (None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("not the state of a numeric dtype")
        if state[1] not in ("<", ">", "|"):
            raise pickle.UnpicklingError("not a byte order")
        self.order = state[1]

    @property
    def real(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """Replacement for an array, with validated state; `build` creates the NumPy array."""

    __slots__ = ("data", "dtype", "order", "shape")

    def __init__(self):
        self.data = None  # set by `fill`

    def __setstate__(self, state):
        if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[3]) is not bool:
            raise pickle.UnpicklingError("not the state of an array")
        self.fill(state[4], state[2], state[1], "F" if state[3] else "C")

    def fill(self, data, dtype, shape, order):
        if type(dtype) is not _DType or type(data) not in (bytes, bytearray) or order not in ("C", "F"):
            raise pickle.UnpicklingError("not the state of a numeric array")
        if type(shape) is not tuple or len(shape) > _MAX_DIMS or any(type(n) is not int or n < 1 for n in shape):
            raise pickle.UnpicklingError("not the shape of a volume")
        if len(data) != math.prod(shape) * dtype.real.itemsize:
            raise pickle.UnpicklingError(f"holds {len(data)} bytes, which does not match the shape {shape}")
        self.data, self.dtype, self.shape, self.order = bytes(data), dtype, shape, order

    def build(self) -> np.ndarray:
        if self.data is None:
            raise pickle.UnpicklingError("an array without content")
        return np.frombuffer(self.data, self.dtype.real).reshape(self.shape, order=self.order).copy(order="K")


class _Reconstruct:
    """Replacement for `numpy.core.multiarray._reconstruct`, which creates an array before its state is set."""

    __slots__ = ()

    def __call__(self, kind, shape, typecode):
        if type(kind) is not _NDArray or shape not in ((0,), 0):
            raise pickle.UnpicklingError("not an array pickled by NumPy")
        return _Array()


class _FromBuffer:
    """Replacement for NumPy's constructor of protocol 5. `axis_order` is given for arrays with permuted axes."""

    __slots__ = ()

    def __call__(self, buffer, dtype, shape, order, axis_order=None):
        if axis_order is not None:
            raise pickle.UnpicklingError("arrays with permuted axes are not supported")
        array = _Array()
        array.fill(buffer, dtype, shape, order)
        return array


class _Latin1:
    """Replacement for `_codecs.encode`, with which old protocols store bytes; only latin1 is allowed."""

    __slots__ = ()

    def __call__(self, text, encoding):
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("only latin1 is supported")
        return text.encode("latin1")


class _MakeDType:
    """Replacement for `numpy.dtype`, for numeric type codes only."""

    __slots__ = ()

    def __call__(self, code, *flags):
        if code not in _CODES:
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not supported")
        return _DType(code)


_REPLACEMENTS = {
    "_reconstruct": _Reconstruct,
    "_frombuffer": _FromBuffer,
    "encode": _Latin1,
    "dtype": _MakeDType,
    "ndarray": _NDArray,
}
_MODULES = {
    "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
    "_frombuffer": ("numpy.core.numeric", "numpy._core.numeric"),
    "encode": ("_codecs",),
    "dtype": ("numpy",),
    "ndarray": ("numpy",),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module not in _MODULES.get(name, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _REPLACEMENTS[name]()

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to an object outside the file")


def read_pickled_array(path: str | Path) -> np.ndarray:
    """Read a pickled numeric array.

    Raises:
        InputError: if the file is missing, too large or damaged, or contains anything else than one numeric array.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: larger than {_MAX_BYTES // 2**20} MiB; not a volume of the authors' archive.")
        found = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
        if type(found) is not _Array:
            raise pickle.UnpicklingError(f"it contains a {type(found).__name__}")
        return found.build()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except Exception as error:  # a crafted file can make the unpickler raise any exception
        reason = first_line(error)[:200]
        raise InputError(f"{path}: not a pickled numeric array ({reason}); it was not executed.") from error


def list_archive(root: str | Path) -> dict[str, list[int]]:
    """List the indices of the volumes in each split of an archive.

    Raises:
        InputError: if there are no volumes, or a label file is missing.
    """
    root = Path(root)
    found = {}
    for split in SPLITS:
        matches = (_IMAGE.fullmatch(p.name) for p in (root / split).glob("im_*.p"))
        found[split] = sorted(int(m[1]) for m in matches if m)
        for index in found[split]:
            for name in LABELS.values():
                if not (root / split / f"{name}_{index}.p").is_file():
                    raise InputError(f"{root / split}: im_{index}.p has no {name}_{index}.p; unpack the archive again.")
    if not any(found.values()):
        raise InputError(f"{root}: no train/im_*.p or test/im_*.p; give the unpacked folder of the authors' archive.")
    return {split: indices for split, indices in found.items() if indices}


def read_archive_volume(root: str | Path, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume, (H, W, D) float32, and its labels, (3, H, W, D) uint8.

    Raises:
        InputError: if a file is invalid, or the shapes of volume and labels differ.
    """
    folder = Path(root) / split
    volume = np.squeeze(read_pickled_array(folder / f"im_{index}.p")).astype(np.float32)
    if volume.ndim != 3:
        raise InputError(f"{folder / f'im_{index}.p'}: has shape {volume.shape}, expected three axes.")
    labels = []
    for name in LABELS.values():
        path = folder / f"{name}_{index}.p"
        label = np.squeeze(read_pickled_array(path))
        whole = label.astype(np.int64)
        if label.shape != volume.shape or (whole != label).any() or whole.min() < 0 or whole.max() > 255:
            raise InputError(
                f"{path}: of shape {label.shape}; labels must be integers in 0..255 of shape {volume.shape}."
            )
        labels.append(whole.astype(np.uint8))
    return volume, np.stack(labels)


def import_archive(root: str | Path, output: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Convert an archive to `<split>/im_<i>.nii.gz` and `<split>/im_<i>_level-<L>_dseg.nii.gz`.

    Returns:
        The paths of the volumes. Their folder can be used as a training dataset.
    """
    output = Path(output)
    jobs = [(split, index) for split, indices in list_archive(root).items() for index in indices]
    targets = [output / split / f"im_{index}.nii.gz" for split, index in jobs]
    check_targets(targets, overwrite)
    for (split, index), target in zip(jobs, targets, strict=True):
        volume, labels = read_archive_volume(root, split, index)
        for level, label in zip(LABELS, labels, strict=True):
            write_volume(target.with_name(f"im_{index}_level-{level}_dseg.nii.gz"), label, labels=True)
        write_volume(target, volume)
    return targets
