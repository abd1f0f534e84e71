"""`load_dataset`: synthetic cells, BraTS, archives and folders as datasets, cached, streamed and mapped."""

import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from diffdiscover3d import load_dataset
from diffdiscover3d.data.datasets import synthetic
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.errors import InputError
from tests.data.datasets.test_authors_archive import make_archive
from tests.helpers.brats_folders import AFFINE, LAYOUTS, make_brats, save
from tests.helpers.loopback_hub import LoopbackHub

datasets = pytest.importorskip("datasets")
SMALL = {"train": 3, "validation": 2, "test": 2}


@pytest.fixture
def few(monkeypatch):
    """Synthetic splits of a few volumes, to be quick."""
    monkeypatch.setattr(synthetic, "SPLITS", SMALL)


def test_synthetic_cells_are_the_generators_bits(tmp_path, few):
    cells = load_dataset("synthetic-irregular", cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in cells.items()} == SMALL
    row = cells["test"][1]
    sample = synthetic.synthesize("irregular", "test", 1)
    np.testing.assert_array_equal(np.asarray(row["volume"], dtype=np.float32), sample.volume)
    np.testing.assert_array_equal(np.asarray(row["labels"]), sample.labels)
    assert row["name"] == "irregular-test-001"
    assert cells["train"].features["labels"].dtype == "uint8"


def test_the_generators_version_is_part_of_the_cache(tmp_path, few):
    load_dataset("synthetic-regular", cache_dir=str(tmp_path))
    folders = [p.parent for p in tmp_path.rglob("dataset_info.json")]
    assert len(folders) == 1 and f"{synthetic.GENERATOR_VERSION}.0.0" in folders[0].parts


def test_streaming_writes_no_cache(tmp_path, few):
    stream = load_dataset("synthetic-regular", split="validation", streaming=True, cache_dir=str(tmp_path))
    assert isinstance(stream, datasets.IterableDataset)
    rows = list(stream)
    sample = synthetic.synthesize("regular", "validation", 1)
    np.testing.assert_array_equal(np.asarray(rows[1]["volume"], dtype=np.float32), sample.volume)
    assert len(rows) == 2 and not list(tmp_path.rglob("*.arrow"))


def test_several_processes_prepare_and_map_the_same(tmp_path, few):
    one = load_dataset("synthetic-regular", split="train", cache_dir=str(tmp_path / "one"))
    two = load_dataset("synthetic-regular", split="train", cache_dir=str(tmp_path / "two"), num_proc=2)
    assert one["name"][:] == two["name"][:]
    means = [
        d.map(lambda row: {"mean": float(np.mean(row["volume"]))}, num_proc=n)["mean"][:]
        for d, n in ((one, 1), (two, 2))
    ]
    assert means[0] == means[1]
    assert means[0][2] == pytest.approx(synthetic.synthesize("regular", "train", 2).volume.mean(), abs=1e-5)


def test_training_volumes_are_mapped(tmp_path, few):
    from diffdiscover3d.data.datasets.builders import as_training_volumes

    cells = load_dataset("synthetic-regular", split="test", cache_dir=str(tmp_path))
    volumes = as_training_volumes(cells, tmp_path / "mapped")
    expected = load_volumes("synthetic-regular", "test")
    for i in range(2):
        assert torch.equal(volumes[i]["volume"], expected[i]["volume"])
        assert torch.equal(volumes[i]["labels"], expected[i]["labels"])
        assert volumes[i]["name"] == expected[i]["name"]
    sent = pickle.loads(pickle.dumps(as_training_volumes(cells, tmp_path / "elsewhere")))  # as for a worker
    assert torch.equal(sent[1]["volume"], expected[1]["volume"])
    volumes.make = None  # items can now only come from cache files
    assert torch.equal(volumes[1]["volume"], expected[1]["volume"])
    # one 50³ volume takes 0.2 ms; the median is robust to a busy machine
    times = []
    for i in range(40):
        clock = time.perf_counter()
        volumes[i % 2]["volume"].sum()
        times.append(time.perf_counter() - clock)
    assert sorted(times)[20] < 5e-3
    with pytest.raises(InputError, match="columns"):
        as_training_volumes(cells.remove_columns("volume"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_brats_in_every_layout(tmp_path, layout):
    root = make_brats(tmp_path / "data", layout)
    brats = load_dataset(str(root), cache_dir=str(tmp_path / "cache"), modalities=("flair", "t1c"), grade="all")
    assert set(brats) == {"train", "validation", "test"} and sum(map(len, brats.values())) == 6
    row = brats["train"][0]
    assert set(row) == {"id", "edition", "grade", "volume", "flair", "t1ce", "labels", "whole_tumour"}
    assert row["edition"] == layout and (row["grade"] in ("HGG", "LGG")) == (layout == "2019")
    for name in ("flair", "t1ce", "labels", "whole_tumour"):
        np.testing.assert_array_equal(row[name].affine, AFFINE)
    tumour, labels = (np.asarray(row[name].dataobj) for name in ("whole_tumour", "labels"))
    np.testing.assert_array_equal(tumour, labels > 0)
    assert tumour.any() and tumour.dtype == np.uint8
    from diffdiscover3d.data.datasets.brats import find_cases, read_image

    case = next(c for c in find_cases(root) if c.id == row["id"])
    np.testing.assert_array_equal(as_volume_tensor(row["flair"])[0, 0], read_image(case, "flair").data)


@pytest.mark.parametrize("options", [{}, {"grade": "LGG"}, {"grade": "all", "split_seed": 3}])
def test_brats_splits_as_the_trainings_do(tmp_path, options):
    root = make_brats(tmp_path / "data", "2019", count=12)
    brats = load_dataset(str(root), cache_dir=str(tmp_path / "cache"), **options)
    expected = BraTSVolumes(root, options=BraTSOptions(**options), cache=tmp_path / "mapped").split_ids
    assert {name: split["id"][:] for name, split in brats.items()} == expected
    assert sum(map(len, expected.values())) == {"LGG": 4, "all": 12}.get(options.get("grade"), 8)


def test_brats_streams_and_splits_the_same(tmp_path):
    root = make_brats(tmp_path / "data", "2021")
    cache = str(tmp_path / "cache")
    stream = load_dataset(str(root), split="test", streaming=True, cache_dir=cache)
    ids = [row["id"] for row in stream]
    assert ids == load_dataset(str(root), split="test", cache_dir=cache)["id"][:]
    from diffdiscover3d.data.datasets.brats import find_cases, split_cases

    assert ids == [c.id for c in split_cases(find_cases(root))["test"]]


def test_brats_files_that_change_are_read_again(tmp_path):
    root, cache = make_brats(tmp_path / "data", "2021", count=3), str(tmp_path / "cache")
    assert np.asarray(load_dataset(str(root), split="test", cache_dir=cache)[0]["whole_tumour"].dataobj).any()
    for path in root.rglob("*_seg.nii.gz"):
        save(path, np.zeros((26, 24, 19), np.uint8))
    assert not np.asarray(load_dataset(str(root), split="test", cache_dir=cache)[0]["whole_tumour"].dataobj).any()


def test_brats_says_what_is_missing(tmp_path):
    root, cache = make_brats(tmp_path / "data", "2021", count=3), str(tmp_path / "cache")
    for path in root.rglob("*00001_seg.nii.gz"):
        path.unlink()
    with pytest.raises(InputError, match=r"BraTS2021_00001: has no mask .* Use labels=False"):
        load_dataset(str(root), cache_dir=cache)
    assert set(load_dataset(str(root), cache_dir=cache, labels=False)["train"].features) == {
        "id", "edition", "grade", "volume"
    }  # fmt: skip
    save(root / "BraTS2021_Training_Data" / "BraTS2021_00001" / "BraTS2021_00001_seg.nii.gz", np.ones((4, 4, 4), "u1"))
    with pytest.raises(InputError, match=r"shape \(4, 4, 4\), the image \(26, 24, 19\)"):
        load_dataset(str(root), cache_dir=cache)


def test_the_authors_archive_and_any_folder(tmp_path, make_nifti):
    cache = str(tmp_path / "cache")
    archive = load_dataset(str(make_archive(tmp_path / "archive")), cache_dir=cache)
    assert {k: len(v) for k, v in archive.items()} == {"train": 2, "test": 2}
    assert np.asarray(archive["test"][0]["labels"]).shape == (3, 7, 6, 5)
    data = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    make_nifti(tmp_path / "scans" / "a.nii.gz", data, np.diag([-1, 2, 3, 1]))
    scans = load_dataset(str(tmp_path / "scans"), split="train", cache_dir=cache)
    np.testing.assert_array_equal(scans[0]["volume"].affine, np.diag([-1, 2, 3, 1]))
    from diffdiscover3d.data.datasets.builders import as_training_volumes

    volume = as_training_volumes(scans, tmp_path / "mapped")[0]["volume"]
    assert torch.equal(volume, load_volumes(str(tmp_path / "scans"))[0]["volume"])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no volumes"):
        load_dataset(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="kind"):
        load_dataset(str(tmp_path), kind="kits")
    with pytest.raises(ValueError, match="no options"):
        load_dataset("synthetic-regular", grade="HGG")
    with pytest.raises(InputError, match="no BraTS cases"):
        load_dataset(str(tmp_path), kind="brats")


ROUND_TRIP = """
import sys, numpy as np, datasets
import diffdiscover3d
from diffdiscover3d.data.datasets import synthetic
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
synthetic.SPLITS = {"train": 3, "validation": 2, "test": 2}
cells = diffdiscover3d.load_dataset("synthetic-regular", cache_dir=sys.argv[1] + "/made")
cells.push_to_hub("user/cells", commit_message="cells")
brats = diffdiscover3d.load_dataset(sys.argv[2], split="train", cache_dir=sys.argv[1] + "/made")
brats.push_to_hub("user/scans")
"""
LOAD_BACK = """
import sys, datasets, numpy as np
cells = datasets.load_dataset("user/cells")
assert set(cells) == {"train", "validation", "test"}
assert "diffdiscover3d" not in sys.modules
scans = datasets.load_dataset("user/scans", split="train")
image = scans[0]["volume"]
assert image.affine[1, 3] == 239 and image.get_data_dtype() == np.int16
from diffdiscover3d.data.datasets.synthetic import synthesize
for i, row in enumerate(cells["validation"]):
    sample = synthesize("regular", "validation", i)
    assert (np.asarray(row["volume"], np.float32) == sample.volume).all()
    assert (np.asarray(row["labels"]) == sample.labels).all()
from diffdiscover3d.data.loading import load_volumes
volumes = load_volumes("hf://datasets/user/cells", "test")
assert len(volumes) == 2 and volumes[0]["volume"].shape == (1, 50, 50, 50)
print("same")
"""


def test_parquet_through_the_hub(tmp_path):
    """Pushed as Parquet, loaded back by plain `datasets.load_dataset` in another process with an empty cache."""
    root = make_brats(tmp_path / "data", "2021", count=3)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with LoopbackHub() as hub:
        for name, code in (("pusher", ROUND_TRIP), ("puller", LOAD_BACK)):
            environment = {
                **clean,
                **hub.environment(tmp_path / name),
                "DIFFDISCOVER3D_CACHE": str(tmp_path / "mapped"),
            }
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path), str(root)],
                capture_output=True,
                text=True,
                env=environment,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == "same"
        files = hub.repos["datasets", "user/cells"].files("main")
        assert sum(name.endswith(".parquet") for name in files) == 3


def test_a_folder_of_other_formats_becomes_nifti(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "scans").mkdir()
    stack = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7)
    metadata = {"axes": "ZYX", "spacing": 3, "unit": "um"}
    tifffile.imwrite(tmp_path / "scans" / "cells.tif", stack, imagej=True, resolution=(2, 4), metadata=metadata)
    image = load_dataset(str(tmp_path / "scans"), split="train", cache_dir=str(tmp_path / "cache"))[0]["volume"]
    assert image.header.get_xyzt_units()[0] == "micron"
    assert np.allclose(image.header.get_zooms(), (0.5, 0.25, 3))
    assert np.array_equal(np.asarray(image.dataobj), stack.T[:, ::-1, ::-1])


MIXED = [(6, 5, 4), (9, 4, 7), (5, 8, 6)]


@pytest.fixture
def mixed(tmp_path, make_nifti):
    """Integer scans of different shapes whose first axis points left."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate(MIXED):
        make_nifti(tmp_path / "mixed" / f"s{i}.nii.gz", rng.integers(-99, 999, shape).astype(np.int16), AFFINE_LEFT)
    return tmp_path / "mixed"


AFFINE_LEFT = np.diag([-1.0, 2.0, 3.0, 1.0])


def in_ras(folder, index) -> torch.Tensor:
    import nibabel as nib

    data = np.asarray(nib.load(folder / f"s{index}.nii.gz").dataobj)[::-1]
    return torch.from_numpy(data.astype(np.float32))


def test_torch_format_on_mixed_shapes(mixed, tmp_path):
    scans = load_dataset(str(mixed), split="train", cache_dir=str(tmp_path / "cache"))
    formatted = scans.with_format("torch")
    for i, row in enumerate(formatted):
        assert row["volume"].dtype == torch.float32 and torch.equal(row["volume"], in_ras(mixed, i))
    batch = formatted[:2]["volume"]
    assert [tuple(v.shape) for v in batch] == MIXED[:2]
    assert np.array_equal(scans.with_format("numpy")[1]["volume"], in_ras(mixed, 1).numpy())
    np.testing.assert_array_equal(scans[0]["volume"].affine, AFFINE_LEFT)  # without a format an image of the file
    loader = torch.utils.data.DataLoader(formatted, batch_size=1)
    assert torch.equal(next(iter(loader))["volume"][0], in_ras(mixed, 0))


def test_torch_format_survives_what_is_done_with_datasets(mixed, tmp_path):
    scans = load_dataset(str(mixed), split="train", cache_dir=str(tmp_path / "cache"))
    measured = scans.map(lambda row: {"mean": float(np.asarray(row["volume"]).mean())}, num_proc=2)
    assert measured["mean"][:] == pytest.approx([float(in_ras(mixed, i).mean()) for i in range(3)], rel=1e-6)
    for dataset in (scans.select([2]), scans.filter(lambda name: name == "s2.nii.gz", input_columns="name")):
        assert torch.equal(dataset.with_format("torch")[0]["volume"], in_ras(mixed, 2))
    again = load_dataset(str(mixed), cache_dir=str(tmp_path / "cache"))  # from the cache
    assert torch.equal(again.with_format("torch")["train"][1]["volume"], in_ras(mixed, 1))


def test_transforms_and_streams_of_mixed_shapes(mixed, tmp_path):
    cache = str(tmp_path / "cache")
    scans = load_dataset(str(mixed), split="train", cache_dir=cache, num_proc=2)
    scans.set_transform(lambda batch: {"volume": [as_volume_tensor(v)[0] for v in batch["volume"]]})
    assert all(torch.equal(scans[i]["volume"][0], in_ras(mixed, i)) for i in range(3))
    stream = load_dataset(str(mixed), split="train", streaming=True, cache_dir=cache)
    assert [row["volume"].shape for row in stream] == MIXED
    for i, row in enumerate(stream.with_format("torch")):
        assert torch.equal(row["volume"], in_ras(mixed, i))


def test_brats_columns_as_tensors(tmp_path):
    root = make_brats(tmp_path / "data", "2021", count=3)
    brats = load_dataset(str(root), split="test", cache_dir=str(tmp_path / "cache")).with_format("torch")
    row = brats[0]
    assert set(row) == {"id", "edition", "grade", "volume", "labels", "whole_tumour"}
    assert row["volume"].dtype == torch.float32 and row["labels"].dtype == torch.int64
    assert torch.equal(row["whole_tumour"], (row["labels"] > 0).long()) and row["volume"].shape == row["labels"].shape


def test_a_file_changed_with_its_size_and_time_is_read_again(mixed, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "stacks").mkdir()
    path, cache = tmp_path / "stacks" / "cells.tif", str(tmp_path / "cache")
    for value in (3, 7):  # of a format that is converted, so that the cache has its voxels
        stamp = path.stat() if path.exists() else None
        tifffile.imwrite(path, np.arange(120, dtype=np.uint16).reshape(5, 4, 6) * value, photometric="minisblack")
        if stamp is not None:
            assert path.stat().st_size == stamp.st_size
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        stacks = load_dataset(str(tmp_path / "stacks"), split="train", cache_dir=cache).with_format("torch")
        assert stacks[0]["volume"].max() == 119 * value
