"""Out-of-core sliding-window inference against MONAI's in-memory inference."""

import contextlib
import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data.utils import dense_patch_slices
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid
from diffdiscover3d.models import window_layout as windows
from diffdiscover3d.models.sliding_window import count_windows, stream_parts
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.window_layout import (
    choose_window,
    hierarchy,
    needs_sliding_window,
    streaming_bytes,
    window_bytes,
    window_starts,
)
from tests.helpers.opened_scans import open_slabs
from tests.helpers.simulated_gpu import simulated_gpu

CHANNELS, STRIDES = (4, 8), (2,)
PIR = np.array([[0, 0, 3, 0], [-1.5, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 1.0]])
NETWORK = {"window_size": 256, "channels": [8, 16], "num_parts": 8}


def small(parts: int = 3, window: int = 16, **more) -> StructureDiscoveryModel:
    return StructureDiscoveryModel(parts, CHANNELS, STRIDES, norm="instance", window_size=window, **more)


def nested(window: int = 16) -> StructureDiscoveryModel:
    torch.manual_seed(0)
    coarse = small(2, window)
    coarse.order_parts(torch.tensor([0.1, 0.9]))
    options = {"norm": "instance", "window_size": window, "channels": CHANNELS, "strides": STRIDES}
    return StructureDiscoveryModel.from_parent(coarse, (3, 2), **options).eval()


def values_of(shape) -> np.ndarray:
    rng = np.random.default_rng(0)
    ramp = sum(np.linspace(0, 300, n).reshape([-1 if i == a else 1 for i in range(3)]) for a, n in enumerate(shape))
    return (ramp + rng.normal(0, 60, shape)).astype(np.float32)


def store(path, canonical: np.ndarray, codes: str) -> None:
    """Write a canonical volume in the given orientation."""
    orientation = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    image = nib.Nifti1Image(canonical, np.diag([2.0, 2.0, 3.0, 1.0])).as_reoriented(orientation)
    nib.save(image, path)
    assert "".join(nib.aff2axcodes(nib.load(path).affine)) == codes


class Collected:
    """A sink that stores all rows and checks that each is written once."""

    def __init__(self, grid: RawGrid, parts: int):
        self.grid = grid
        self.soft = torch.full((parts, *reversed(grid.shape)), torch.nan)

    def __call__(self, plane: int, row: int, sums: torch.Tensor) -> None:
        target = self.soft[:, plane, row : row + sums.shape[1]]
        assert target.isnan().all()
        target[:] = sums / sums.sum(dim=0)

    def canonical(self) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.grid.to_canonical(part.numpy()) for part in self.soft]))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA", "IPR"])
@pytest.mark.parametrize("shape", [(40, 21, 17), (9, 33, 70), (16, 16, 29)])
def test_it_finds_what_a_window_in_memory_finds(tmp_path, codes, shape):
    torch.manual_seed(1)
    network, values = small().eval(), values_of(shape)
    store(tmp_path / "a.nii", values, codes)
    expected = network.segment(values).probabilities[0]
    calls = []
    with open_slabs(tmp_path / "a.nii", tmp_path) as scan:
        assert scan.shape == shape
        found = Collected(scan.grid, 3)
        stream_parts(network, scan, 16, found, on_window=lambda: calls.append(1))
        assert len(calls) == count_windows(scan.grid, 16) > 1
    torch.testing.assert_close(found.canonical(), expected, rtol=1e-4, atol=1e-5)
    assert len(expected.argmax(dim=0).unique()) > 1


@pytest.mark.parametrize("codes", ["RAS", "SLA"])
def test_levels_of_a_nested_network(tmp_path, codes):
    network, values = nested(), values_of((22, 18, 37))
    store(tmp_path / "a.nii", values, codes)
    above = network.parent_model.segment(values).labels[0]
    normalized = torch.from_numpy((values - values.min()) / (values.max() - values.min()))
    inside = [normalized[above == part].double() for part in range(2)]
    moments = torch.tensor([[x.mean(), x.std(correction=0)] for x in inside])
    with open_slabs(tmp_path / "a.nii", tmp_path) as scan, open(tmp_path / "parents", "w+b", buffering=0) as file:
        parents = RawGrid(file, scan.grid.shape, np.uint8, scan.grid.orientation)

        def keep(plane, row, sums):
            parents.write_rows(plane, row, sums.argmax(dim=0).numpy())

        stream_parts(network.parent_model, scan, 16, keep)
        everything = tuple(slice(0, n) for n in scan.shape)
        np.testing.assert_array_equal(parents.read(everything), above.numpy())
        found = Collected(scan.grid, 5)
        stream_parts(network, scan, 16, found, parents=parents, moments=moments)
    soft = found.canonical()
    torch.testing.assert_close(soft, network.segment(values).probabilities[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.tensor(network.parents)[soft.argmax(dim=0)], above.long())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_computes_the_next_window_while_one_is_added(tmp_path, device, monkeypatch):
    network, values = nested(), values_of((22, 18, 37))
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    labels = (values > 150).astype(np.uint8)
    moments = torch.tensor([[0.2, 0.1], [0.6, 0.1]])
    computed, at_window = [], []
    real = StructureDiscoveryModel.segment_window

    def segment_window(*given):
        computed.append(given)
        return real(*given)

    monkeypatch.setattr(StructureDiscoveryModel, "segment_window", segment_window)
    with open_slabs(tmp_path / "a.nii", tmp_path) as scan, open(tmp_path / "parents", "w+b", buffering=0) as file:
        parents = RawGrid(file, scan.grid.shape, np.uint8, scan.grid.orientation)
        for plane in range(labels.shape[2]):
            parents.write_rows(plane, 0, labels[:, :, plane].T)
        expected = Collected(scan.grid, 5)
        stream_parts(network, scan, 16, expected, parents=parents, moments=moments)
        computed.clear()
        found = Collected(scan.grid, 5)
        with simulated_gpu(monkeypatch) if device == "cuda" else contextlib.nullcontext() as gpu:
            network.to(device)
            before = gpu and len(gpu.waits)
            stream_parts(
                network, scan, 16, found, parents=parents, moments=moments.to(device),
                on_window=lambda: at_window.append(len(computed)),
            )  # fmt: skip
            # moments, and the weights of the windows, which are computed once
            assert gpu is None or len(gpu.waits) - before <= 2
    count = len(computed)
    ahead = 1 if device == "cuda" else 0
    assert count > 4 and at_window == [min(i + 1 + ahead, count) for i in range(count)]
    torch.testing.assert_close(found.soft, expected.soft)


@pytest.mark.parametrize(("length", "window"), itertools.product([5, 16, 17, 28, 29, 100, 101], [1, 3, 16, 24]))
def test_windows_lie_where_monai_puts_them(length, window):
    roi = min(window, length)
    step = length if roi == length else max(1, int(roi * 0.75))
    expected = [x.start for (x, _) in dense_patch_slices((length, 3), (roi, 3), (step, 3))]
    assert window_starts(length, window) == expected


# window sizes


def test_small_volumes_keep_the_networks_own_window():
    assert choose_window((256, 200, 256), NETWORK) == 256 and not needs_sliding_window((256, 200, 256), NETWORK)
    # the number of voxels decides
    assert choose_window((300, 100, 100), NETWORK) == 300 and not needs_sliding_window((300, 100, 100, 7), NETWORK)
    assert choose_window((257, 256, 256), NETWORK) == 256 and needs_sliding_window((257, 256, 256), NETWORK)
    assert choose_window((300, 300, 300), {**NETWORK, "num_parts": 2}) == 256
    assert choose_window((300, 300, 300), {**NETWORK, "num_parts": 12}) == 240  # with larger accumulators


@pytest.mark.parametrize("shape", [(512, 512, 512), (1024, 1024, 512), (640, 300, 640)])
@pytest.mark.parametrize("parts", [2, 8])
def test_windows_of_large_volumes_stay_in_the_budget(shape, parts):
    network = {**NETWORK, "num_parts": parts}
    chosen = {choose_window(order, network) for order in itertools.permutations(shape)}
    (window,) = chosen  # for every order of the axes
    takes = {w: max(window_bytes(o, w, network) for o in itertools.permutations(shape)) for w in range(128, 257, 16)}
    assert window == max(w for w in takes if takes[w] <= windows.BUDGET)
    assert (window == 256) == (takes[256] <= windows.BUDGET)
    assert streaming_bytes(shape, network) < windows.BUDGET * 1.1


def test_beyond_all_bounds_the_smallest_window_is_left():
    assert choose_window((2048, 2048, 1024), {**NETWORK, "num_parts": 4}) == 112  # the largest that fits
    assert choose_window((5000, 5000, 5000), NETWORK) == 64
    assert choose_window((5000, 5000, 5000), {**NETWORK, "window_size": 32}) == 32
    assert streaming_bytes((5000, 5000, 5000), NETWORK) > windows.BUDGET


def test_a_hierarchy_slides_where_one_of_its_networks_does():
    network = {**NETWORK, "parent": {**NETWORK, "num_parts": 2, "window_size": 64}}
    assert [n["num_parts"] for n in hierarchy(network)] == [2, 8]
    assert (
        needs_sliding_window((64, 64, 65), network)
        and not needs_sliding_window((64, 64, 64), network)
        and not needs_sliding_window((655, 20, 20), network)
    )
    wide = {**NETWORK, "parent": {**NETWORK, "channels": [64]}}
    assert streaming_bytes((256,) * 3, wide) > 5 * streaming_bytes((256,) * 3, NETWORK)


def test_sums_by_hand():
    # two slabs of 8 planes that share 2, and rows of 8 lines
    assert window_bytes((20, 20, 14), 8, {"num_parts": 3, "channels": [2]}) == 42 * 8**3 + 12 * (
        2 * 20 * 20 + 8 * 8 * 20
    )


def test_regions_and_planes(tmp_path):
    values = np.arange(4 * 5 * 6, dtype=">i2").reshape(4, 5, 6)  # as stored, first axis fastest
    path = tmp_path / "raw"
    path.write_bytes(b"head" + values.tobytes(order="F"))
    image = nib.Nifti1Image(values, PIR)
    orientation = io_orientation(PIR)
    canonical = np.asarray(nib.as_closest_canonical(image).dataobj)
    with open(path, "rb", buffering=0) as file:
        grid = RawGrid(file, values.shape, values.dtype, orientation, 4)
        assert grid.canonical_shape == canonical.shape
        region = (slice(1, 5), slice(0, 3), slice(2, 4))
        np.testing.assert_array_equal(grid.read(region), canonical[region])
        assert list(grid.slabs(41)) == [(0, 2), (2, 4), (4, 6)] and list(grid.slabs(1))[-1] == (5, 6)
        np.testing.assert_array_equal(grid.read_planes(2, 4), values.T[2:4])
        np.testing.assert_array_equal(grid.read(grid.slab_region(2, 4)), grid.to_canonical(values.T[2:4]))
        with pytest.raises(OSError, match="truncated while it was read"):
            RawGrid(file, (4, 5, 7), values.dtype, orientation, 4).read_planes(6, 7)
