"""Read fuzzed headers under a memory limit: python fuzz_headers.py FOLDER COUNT SEED; prints counts as JSON."""

import gzip
import json
import os
import resource
import struct
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread of it reserves memory
LIMIT = 2**30
FIELDS = [  # offset and layout of the fields of a NIfTI-1 header
    (0, "i"), (39, "B"), *((40 + 2 * i, "h") for i in range(8)), *((56 + 4 * i, "f") for i in range(3)), (68, "h"),
    (70, "h"), (72, "h"), (74, "h"), *((76 + 4 * i, "f") for i in range(8)), (108, "f"), (112, "f"), (116, "f"),
    (120, "h"), (122, "B"), (123, "B"), (124, "f"), (128, "f"), (252, "h"), (254, "h"),
    *((256 + 4 * i, "f") for i in range(6)), *((280 + 4 * i, "f") for i in range(12)), (344, "4s"),
]  # fmt: skip
SPECIAL = {
    "i": [0, 348, 540, -1, 2**31 - 1],
    "h": [0, 1, 2, 3, 4, 7, 8, 16, 64, 128, 255, 256, 512, 768, 1024, 1536, 1792, 2048, 2304, -1, 32767, -32768],
    "f": [0.0, -0.0, 1.0, -1.0, 348.0, 352.0, 1e9, 1e30, -1e38, float("nan"), float("inf"), float("-inf"), 1e-45],
    "B": [0, 1, 2, 10, 255],
    "4s": [b"n+1\0", b"n+2\0", b"ni1\0", b"\0\0\0\0", b"XXXX"],
}


def main(folder: Path, wanted: int, seed: int) -> dict:
    import nibabel as nib
    import numpy as np
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as fixed_seed
    from hypothesis import strategies as st

    from diffdiscover3d.data.formats.nifti.reading import read_nifti
    from diffdiscover3d.errors import DiffDiscoverError

    data = np.random.default_rng(seed).normal(100, 20, (7, 6, 5)).astype(np.float32)
    good = {order: fresh_file(nib, data, order) for order in "<>"}
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    kinds, unexpected, times = Counter(), [], []

    def value(layout):
        at_random = {
            "i": st.integers(-(2**31), 2**31 - 1),
            "h": st.integers(-(2**15), 2**15 - 1),
            "f": st.floats(width=32),
            "B": st.integers(0, 255),
            "4s": st.binary(min_size=4, max_size=4),
        }[layout]
        return st.one_of(st.sampled_from(SPECIAL[layout]), at_random)

    patch = st.sampled_from(FIELDS).flatmap(lambda f: st.tuples(st.just(f), value(f[1])))
    flip = st.tuples(st.integers(0, 347), st.integers(0, 255))

    @fixed_seed(seed)
    @settings(max_examples=wanted, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        order=st.sampled_from("<>"),
        fields=st.lists(patch, max_size=4),
        flips=st.lists(flip, max_size=4),
        noise=st.one_of(st.none(), st.none(), st.none(), st.binary(min_size=348, max_size=348)),
        ending=st.sampled_from([".nii", ".nii.gz"]),
        lenient=st.booleans(),
    )
    def check(order, fields, flips, noise, ending, lenient):
        raw = bytearray(good[order])
        if noise is not None:
            raw[4:348] = noise[4:]
        for (offset, layout), what in fields:
            struct.pack_into(order + layout, raw, offset, what)
        for offset, what in flips:
            raw[offset] = what
        path = folder / f"fuzzed{ending}"
        path.write_bytes(gzip.compress(bytes(raw), 1) if ending == ".nii.gz" else bytes(raw))
        options = {"volume": 0, "nan_to_zero": True, "ignore_affine": True} if lenient else {}
        clock = time.perf_counter()
        try:
            scan = read_nifti(path, **options)
            assert scan.data.dtype == np.float32 and scan.data.ndim == 3 and np.isfinite(scan.data).all()
            kinds["read"] += 1
        except DiffDiscoverError as error:
            if "\n" in str(error) or str(path) not in str(error):
                unexpected.append(f"message {error!r}")
            kinds[type(error).__name__] += 1
        except BaseException as error:
            unexpected.append(f"{type(error).__name__}: {error} for {bytes(raw[:348]).hex()}")
        times.append(time.perf_counter() - clock)

    check()
    return {
        "headers": len(times),
        "read": kinds["read"],
        "refused": sum(kinds.values()) - kinds["read"],
        "by_error": {k: v for k, v in sorted(kinds.items()) if k != "read"},
        "unexpected": unexpected[:20],
        "slowest_seconds": round(max(times), 3),
        "memory_limit_gib": LIMIT / 2**30,
        "peak_resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def fresh_file(nib, data, order: str) -> bytes:
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(data.dtype.newbyteorder(order))
    return nib.Nifti1Image(
        data.astype(data.dtype.newbyteorder(order)),
        nib.affines.from_matvec([[2, 0, 0], [0, 2, 0], [0, 0, 3]], [1, 2, 3]),
        header,
    ).to_bytes()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
