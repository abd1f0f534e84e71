"""The files that `segment` writes beside the label map, their grid, sharing work and resuming."""

import gzip
import html
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import ModelError, OutputError
from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.parts import count_pairs
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.in_memory import keep_within_parents

SHAPE = (12, 14, 10)
ANGLE = np.deg2rad(20)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
AFFINES = {
    "RAS": np.diag([1.5, 2, 3, 1]),
    "LAS": np.diag([-1.5, 2, 3, 1]),
    "LPS": np.diag([-1.5, -2, 3, 1]),
    "PIR": np.array([[0, 0, 3, 0], [-1.5, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 1.0]]),
    "oblique": np.block([[TURN @ np.diag([-1.5, 2, 3]), np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]),
}


class Threshold:
    """A network with known parts: 1 the bright voxels, 0 all others."""

    config = SimpleNamespace(num_parts=2)
    device = torch.device("cpu")
    parent_model, levels = None, ()

    def to(self, _):
        return self

    def segment(self, volume):
        bright = (torch.as_tensor(volume).reshape(1, *volume.shape[-3:]) > 500).float()
        return SimpleNamespace(probabilities=torch.stack([1 - bright, bright], dim=1), labels=bright.byte())


def noise(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(100, 10, shape).astype(np.float32)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def levelled(tiny_discovery, tmp_path):
    """A model folder as `discover` writes it: a network that divides the largest part of the tiny one into three."""
    coarse = load_discovery(str(tiny_discovery))
    volume = torch.from_numpy(noise())
    children = [1, 1, 1]
    children[int(coarse.segment(volume).labels.flatten().bincount().argmax())] = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fine = StructureDiscoveryModel.from_parent(coarse, children, norm="instance").eval()
    assert len(fine.segment(volume).labels.unique()) > len(coarse.segment(volume).labels.unique())
    fine.save_pretrained(tmp_path / "levelled" / "discovery")
    return tmp_path / "levelled"


@pytest.mark.parametrize("orientation", AFFINES)
def test_a_marked_corner_stays_in_its_corner(tmp_path, make_nifti, monkeypatch, orientation):
    sitk = pytest.importorskip("SimpleITK")
    affine = AFFINES[orientation].copy()
    affine[:3, 3] = 11, -7, 5
    values = noise()
    values[:2, -3:, :1] = 1000  # one corner, with a different extent along every axis
    scan = make_nifti(tmp_path / "scan.nii.gz", values, affine)
    monkeypatch.setattr("diffdiscover3d.hub.registry.load_discovery", lambda *_: Threshold())
    (result,) = segment(scan, tmp_path / "out", statistics=True, probabilities=True)

    marked = nib.load(result.labels)
    np.testing.assert_array_equal(marked.affine, nib.load(scan).affine)
    np.testing.assert_array_equal(np.asarray(marked.dataobj), values == 1000)
    soft = nib.load(result.levels[2].probabilities)
    np.testing.assert_array_equal(soft.get_fdata()[..., 1], values == 1000)
    np.testing.assert_array_equal(soft.affine, marked.affine)

    one, two = sitk.ReadImage(str(scan)), sitk.ReadImage(str(result.labels))
    assert one.GetSize() == two.GetSize() and one.GetSpacing() == two.GetSpacing()
    assert one.GetOrigin() == two.GetOrigin() and one.GetDirection() == two.GetDirection()
    bright, labelled = sitk.GetArrayFromImage(one) == 1000, sitk.GetArrayFromImage(two)
    np.testing.assert_array_equal(labelled, bright)
    # the table's centroid is that of SimpleITK, whose world is LPS
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(two)
    lines = [line.split("\t") for line in result.levels[2].table.read_text().splitlines()]
    row = dict(zip(lines[0], lines[2], strict=True))
    centre = np.array([float(row[f"centroid_{axis}"]) for axis in "xyz"])
    np.testing.assert_allclose(centre * [-1, -1, 1], shape.GetCentroid(1), atol=1e-3)
    assert float(row["volume_ml"]) == pytest.approx(shape.GetPhysicalSize(1) / 1000, rel=1e-5)


def test_every_file_of_every_level(tmp_path, make_nifti, levelled):
    scan = make_nifti(tmp_path / "in" / "scan.nii.gz", noise())
    everything = {"preview": True, "statistics": True, "tables": True, "probabilities": True, "report": True}
    (result,) = segment(scan, tmp_path / "out", model=str(levelled), level="all", **everything)
    endings = ("dseg.ctbl", "dseg.json", "dseg.label", "dseg.nii.gz", "dseg.tsv", "probseg.nii.gz")
    expected = [f"scan_level-{level}_{ending}" for level in (1, 2) for ending in endings]
    assert names(tmp_path / "out") == sorted([*expected, "scan_dseg.png", "scan_report.html", "scan_tree.json"])
    assert list(result.levels) == [1, 2]
    soft = nib.load(result.levels[1].probabilities).get_fdata()
    np.testing.assert_allclose(soft.sum(axis=-1), 1, atol=1e-5)
    one, two = (np.asarray(nib.load(result.levels[level].labels).dataobj) for level in (1, 2))
    np.testing.assert_array_equal(soft.argmax(axis=-1), one)
    # both are the networks' labels, and every fine part is nested in the coarse one that it divides
    networks = {level: load_discovery(str(levelled), level) for level in (1, 2)}
    for level, labels in ((1, one), (2, two)):
        np.testing.assert_array_equal(labels, networks[level].segment(scan).labels[0].numpy())
    present = set(np.unique(two))
    assert len(present) > len(np.unique(one))
    for link in json.loads(result.tree.read_text())["tree"]:
        if link["part"] in present:
            assert (link["parent"], link["overlap"]) == (networks[2].parents[link["part"]], 1.0)
        else:
            assert link["parent"] is None
    sidecar = json.loads(result.levels[2].sidecar.read_text())
    columns = result.levels[2].table.read_text().splitlines()[0].split("\t")
    assert all("Description" in sidecar[c] for c in columns[4:]) and sidecar["model"]["level"] == 2


@pytest.mark.parametrize("fast", [False, True])
def test_a_coarser_level_is_found_once(tmp_path, make_nifti, levelled, monkeypatch, fast):
    scan = make_nifti(tmp_path / "scan.nii.gz", noise(shape=(36, 40, 34)))
    calls, real = [], StructureDiscoveryModel._logits

    def counted(self, *rest):
        calls.append(self.config.num_parts)
        return real(self, *rest)

    alone = {x: segment(scan, tmp_path / str(x), model=str(levelled), level=x, fast=fast)[0] for x in (1, 2)}
    monkeypatch.setattr(StructureDiscoveryModel, "_logits", counted)
    (both,) = segment(scan, tmp_path / "all", model=str(levelled), level="all", order="size", fast=fast)
    assert calls == [3, 5]
    (both,) = segment(scan, tmp_path / "all", model=str(levelled), level="all", fast=fast, overwrite=True)
    for level, result in alone.items():
        np.testing.assert_array_equal(nib.load(both.levels[level].labels).dataobj, nib.load(result.labels).dataobj)


@pytest.mark.parametrize("order", ["model", "size"])
@pytest.mark.parametrize("grid", [None, (17, 21, 15)], ids=["fast", "working grid"])
def test_levels_are_nested_after_resampling(tmp_path, make_nifti, levelled, grid, order):
    values = noise(shape=(36, 40, 34))
    scan = make_nifti(tmp_path / "scan.nii.gz", values)
    if grid:
        (levelled / "discovery" / "working_grid.json").write_text(json.dumps({"grid": grid}))
    options = {"level": "all", "fast": grid is None, "order": order, "probabilities": True}
    (result,) = segment(scan, tmp_path / "out", model=str(levelled), **options)
    one, two = (np.asarray(nib.load(result.levels[level].labels).dataobj).astype(int) for level in (1, 2))
    counts = count_pairs(two, one, 5, 3)
    assert (counts.sum(axis=1) - counts.max(axis=1)).sum() == 0  # voxels outside the parent
    soft = nib.load(result.levels[2].probabilities).get_fdata()
    np.testing.assert_array_equal(soft.argmax(axis=-1), two)
    np.testing.assert_allclose(soft.sum(axis=-1), 1, atol=1e-5)
    # resampled apart, the levels disagree at the borders of the parents
    small = resize_volume(torch.from_numpy(values)[None, None], grid or (18, 20, 17))
    network = load_discovery(str(levelled))
    apart = [
        F.interpolate(n.segment(small).probabilities, size=values.shape, mode="trilinear", align_corners=False)
        for n in network.levels
    ]
    coarse, fine = (a[0].argmax(dim=0).numpy() for a in apart)
    assert (np.array(network.parents)[fine] != coarse).any()


@pytest.mark.parametrize("smooth", [0.0, 1.2])
@pytest.mark.parametrize("grid", [None, (17, 21, 15), "own"], ids=["fast", "working grid", "own grid"])
def test_levels_are_nested_after_small_pieces_are_merged(tmp_path, make_nifti, levelled, grid, smooth):
    scan = make_nifti(tmp_path / "scan.nii.gz", noise(3, (36, 40, 34)))
    if isinstance(grid, tuple):
        (levelled / "discovery" / "working_grid.json").write_text(json.dumps({"grid": grid}))
    options = {"level": "all", "fast": grid is None, "smooth": smooth}
    found = {}
    for min_size in (0, 25):
        (result,) = segment(scan, tmp_path / str(min_size), model=str(levelled), min_size=min_size, **options)
        one, two = (np.asarray(nib.load(result.levels[level].labels).dataobj).astype(int) for level in (1, 2))
        parents = np.array(load_discovery(str(levelled)).parents)
        assert np.array_equal(parents[two], one)  # no voxel is outside the parent
        found[min_size] = one, two
    assert all((a != b).any() for a, b in zip(found[0], found[25], strict=True))
    # small pieces are left only where a coarser part consists of nothing else
    one, two = found[25]
    for within, labels in ((np.zeros_like(one), one), (one, two)):
        for parent in np.unique(within):
            sizes = []
            for part in np.unique(labels[within == parent]):
                pieces, _ = ndimage.label((labels == part) & (within == parent))
                sizes += np.bincount(pieces.ravel())[1:].tolist()
            assert min(sizes) >= 25 or max(sizes) < 25


def test_parts_without_probability_within_their_parent():
    soft = torch.tensor([0.5, 0.0, 0.5]).reshape(3, 1, 1, 1).repeat(1, 1, 1, 2)
    soft[:, 0, 0, 1] = torch.tensor([0.0, 0.0, 1.0])
    keep_within_parents(soft, torch.zeros(1, 1, 2, dtype=torch.uint8), (0, 0, 1))
    assert soft[:, 0, 0].T.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]


def test_order_by_size(tmp_path, make_nifti, tiny_discovery):
    scan = make_nifti(tmp_path / "scan.nii.gz", noise())
    (plain,) = segment(scan, tmp_path / "a", model=str(tiny_discovery), probabilities=True)
    (sized,) = segment(scan, tmp_path / "b", model=str(tiny_discovery), order="size", probabilities=True)
    assert list(sized.fractions) == sorted(plain.fractions, reverse=True)
    old, new = (np.asarray(nib.load(r.labels).dataobj) for r in (plain, sized))
    assert len(set(zip(old.ravel().tolist(), new.ravel().tolist(), strict=True))) == len(np.unique(old))
    soft = nib.load(sized.levels[None].probabilities).get_fdata()
    np.testing.assert_array_equal(soft.argmax(axis=-1), new)
    with pytest.raises(ValueError, match="order"):
        segment(scan, tmp_path / "c", model=str(tiny_discovery), order="name")


def test_fast_is_half_the_resolution(tmp_path, make_nifti, tiny_discovery):
    values = noise(shape=(40, 35, 33))
    scan = make_nifti(tmp_path / "scan.nii.gz", values)
    (result,) = segment(scan, tmp_path / "out", model=str(tiny_discovery), fast=True)
    half = resize_volume(torch.from_numpy(values)[None, None], (20, 18, 17))
    soft = load_discovery(str(tiny_discovery)).segment(half).probabilities
    expected = F.interpolate(soft, size=values.shape, mode="trilinear", align_corners=False)[0].argmax(dim=0)
    np.testing.assert_array_equal(np.asarray(nib.load(result.labels).dataobj), expected)
    assert json.loads(result.sidecar.read_text())["arguments"]["fast"] is True and result.notes == ()
    small = make_nifti(tmp_path / "small.nii.gz", noise())
    (result,) = segment(small, tmp_path / "out", model=str(tiny_discovery), fast=True)
    assert "too small to be halved" in result.notes[0]


def test_resume_skips_what_is_done(tmp_path, make_nifti, tiny_discovery):
    scans = [make_nifti(tmp_path / "in" / f"{n}.nii.gz", noise(i)) for i, n in enumerate("abcd")]
    out, model = tmp_path / "out", str(tiny_discovery)
    segment(scans, out, model=model)
    (out / "b_dseg.json").unlink()  # as after an interruption
    make_nifti(scans[2], noise(9))  # another scan under the same name
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("[ad]_*")}
    skipped = []
    results = segment(scans, out, model=model, resume=True, on_skip=skipped.append)
    assert [r.input for r in results] == scans[1:3] and skipped == [scans[0], scans[3]]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("[ad]_*")} == kept
    with pytest.raises(OutputError, match="already exists"):
        segment(scans, out, model=model)
    with pytest.raises(ModelError, match=r"another argument; use --overwrite"):
        segment(scans, out, model=model, resume=True, order="size")


def test_resume_takes_no_mixed_or_truncated_results(tmp_path, make_nifti, levelled):
    scan = make_nifti(tmp_path / "scan.nii.gz", noise())
    options = {"model": str(levelled), "level": "all", "resume": True}
    (whole,) = segment(scan, tmp_path / "out", **options)
    files = whole.levels[2]
    expected = {path: path.read_bytes() for path in (files.labels, files.table)}
    assert segment(scan, tmp_path / "out", **options) == []
    unhashed = {k: v for k, v in json.loads(files.sidecar.read_text()).items() if k != "outputs"}
    damages = {
        "truncated map": (files.labels, expected[files.labels][:-40]),
        "map of another level": (files.labels, whole.levels[1].labels.read_bytes()),
        "empty table": (files.table, b""),
        "list as sidecar": (files.sidecar, b"[]"),
        "deep sidecar": (files.sidecar, b"[" * 100_000),
        "sidecar without hashes": (files.sidecar, json.dumps(unhashed).encode()),
    }
    for damage, (path, content) in damages.items():
        path.write_bytes(content)
        assert len(segment(scan, tmp_path / "out", **options)) == 1, damage
        assert {path: path.read_bytes() for path in expected} == expected, damage


@pytest.mark.parametrize("sidecar", [None, "{}", '{"Manual": true}'])
@pytest.mark.parametrize("replacing", ["resume", "overwrite"])
def test_label_maps_of_others_are_never_replaced(tmp_path, make_nifti, tiny_discovery, sidecar, replacing):
    scan = make_nifti(tmp_path / "scan.nii.gz", noise())
    manual = make_nifti(tmp_path / "out" / "scan_dseg.nii.gz", np.ones(noise().shape, np.uint8)).read_bytes()
    (tmp_path / "out" / "scan_dseg.tsv").write_text("index\tname\n1\tliver\n")  # a table of BIDS
    if sidecar is not None:
        (tmp_path / "out" / "scan_dseg.json").write_text(sidecar)
    with pytest.raises(OutputError, match=r"scan_dseg\.nii\.gz: was not made by diffdiscover3d"):
        segment(scan, tmp_path / "out", model=str(tiny_discovery), **{replacing: True})
    assert (tmp_path / "out" / "scan_dseg.nii.gz").read_bytes() == manual


def test_nothing_private_is_copied_into_results(tmp_path, make_nifti, levelled):
    def mod(header):
        header["db_name"], header["aux_file"], header["descrip"] = b"Jane Doe", b"/home/jane/x.nii", b"1970-01-02"

    values = noise()
    values[2, 3, 4] = 1e8
    scan = make_nifti(tmp_path / "scan.nii.gz", values, mod=mod)
    everything = {"preview": True, "statistics": True, "tables": True, "probabilities": True, "report": True}
    (result,) = segment(scan, tmp_path / "out", model=str(levelled), level="all", **everything)
    for path in (tmp_path / "out").iterdir():
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for private in (b"Jane", b"jane", b"1970-01-02", str(tmp_path).encode()):
            assert private not in content, (path.name, private)
    # what rules the intensity range is noted in the terminal, the sidecar and the report
    (note,) = [n for n in result.notes if "rule the intensity range" in n]
    assert note in json.loads(result.sidecar.read_text())["notes"]
    assert html.escape(note) in result.report.read_text()


def test_levels_a_model_does_not_have(tmp_path, make_nifti, levelled, tiny_discovery):
    scan = make_nifti(tmp_path / "scan.nii.gz", noise())
    with pytest.raises(ModelError, match=r"\[1, 2\], not 3"):
        segment(scan, beside_inputs=True, model=str(levelled), level=3)
    with pytest.raises(ModelError, match=r"has the levels \[1\], not 2"):
        segment(scan, beside_inputs=True, model=str(tiny_discovery), level=2)
    (result,) = segment(scan, beside_inputs=True, model=str(tiny_discovery), level="all")
    assert list(result.levels) == [None] and result.tree is None


def test_shares_are_disjoint_and_complete(tmp_path, make_nifti, tiny_discovery, monkeypatch):
    scans = [make_nifti(tmp_path / "in" / f"s{i}.nii.gz", noise(i)) for i in range(5)]
    done = []
    for rank in range(2):  # the second must accept the files of the first
        monkeypatch.setattr("diffdiscover3d.segmentation.outputs.rank_and_world_size", lambda rank=rank: (rank, 2))
        done.append([r.input for r in segment(tmp_path / "in", tmp_path / "out", model=str(tiny_discovery))])
    assert done == [scans[::2], scans[1::2]]


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path, make_nifti, tiny_discovery):
    for i in range(5):
        make_nifti(tmp_path / "in" / f"s{i}.nii.gz", noise(i))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    segment(tmp_path / "in", alone, model=str(tiny_discovery))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = ["diffdiscover3d.cli", "segment", tmp_path / "in", "-o", shared, "--model", tiny_discovery]
    done = subprocess.run(
        [str(c) for c in (*launch, *command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5  # each scan was segmented by one process
    for path in alone.glob("*.nii.gz"):
        assert (shared / path.name).read_bytes() == path.read_bytes()
    assert names(shared) == names(alone)
