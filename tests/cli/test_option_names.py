"""Errors of a command name only options that the command has."""

import re

import nibabel as nib
import numpy as np
import pytest
import typer

from diffdiscover3d.cli.app import app
from diffdiscover3d.data.formats.registry import label_suffix, stem
from diffdiscover3d.train import main, make_parser
from tests.helpers import volume_files as files
from tests.helpers.brats_folders import make_brats
from tests.helpers.corpus import CORPUS

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_OF_OTHERS = {"--raw"}  # of gdcmconv
COMMANDS = typer.main.get_command(app).commands
TRAININGS = {
    name: set(parser._option_string_actions)
    for name, parser in make_parser()._subparsers._group_actions[0].choices.items()
}

FIXED = ["--mixed-precision", "no", "--memory-format", "channels_last"]  # otherwise measured, which takes long


def options_of(command: str) -> set[str]:
    return {name for p in COMMANDS[command].params for name in (*p.opts, *p.secondary_opts)}


def messages(capsys, command: str, *arguments) -> str:
    """The output of a failing command."""
    capsys.readouterr()
    try:
        COMMANDS[command].main([str(a) for a in arguments], prog_name=command, standalone_mode=False)
        raised = ""
    except Exception as error:
        raised = str(error)
    out, err = capsys.readouterr()
    return out + err + raised


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """Inputs for each of which an error names an option, and all damaged files of the corpus."""
    folder = tmp_path_factory.mktemp("unusable")
    paths = []
    for name, (write, expected) in CORPUS.items():
        if expected and name not in ("missing", "missing.nii.gz"):
            write(folder / name)
            paths.append(folder / name)
    array, affine = files.stored(files.CANONICAL)
    files.write_mgh(folder / "flat.mgz", array.astype(np.float32), affine @ np.diag([0.0, 0, 0, 1]))
    for number in (9, 10):
        files.write_dicom(folder / "series", array, affine, uid=f"1.2.{number}", number=number)
    store = files.write_ome_zarr(folder / "lacking.ome.zarr", files.phantom())
    next(p for p in store.rglob("*") if p.is_file() and p.suffix != ".json").unlink()
    (folder / "own").mkdir()
    nib.save(nib.Nifti1Image(files.phantom(), np.eye(4)), folder / "own" / "a_dseg.nii.gz")
    return [*paths, folder / "flat.mgz", folder / "series", store, folder / "own"]


@pytest.mark.parametrize("command", ["segment", "features", "report", "discover", "list"])
def test_errors_of_commands_about_inputs(unusable, tmp_path, capsys, command):
    parts = tmp_path / "parts"
    parts.mkdir()
    named = set()
    for number, path in enumerate(unusable):
        if command == "discover" and path.name == "series":
            continue  # it takes both
        arguments = [path]
        if command == "report":
            (parts / f"{stem(path)}_dseg{label_suffix(path)}").touch()
            arguments += ["--parts", parts]
        elif command != "list":
            arguments += ["-o", tmp_path / str(number), "--device", "cpu"]
        said = messages(capsys, command, *arguments)
        assert path.name in said or path.parent.name in said, path
        found = set(_OPTION.findall(said)) - _OF_OTHERS
        assert found <= options_of(command), said
        named |= found
    if command != "list":
        assert {"--volume", "--nan-to-zero", "--ignore-affine", "--voxel-size", "--missing-chunks"} <= named


@pytest.mark.parametrize("phase", TRAININGS)
def test_errors_of_trainings_about_inputs(unusable, tmp_path, capsys, phase):
    named = set()
    chosen = ("d4_time.nii.gz", "nan.nii.gz", "sform_zero.nii.gz", "flat.mgz", "lacking.ome.zarr", "own")
    for path in (path for path in unusable if path.name in chosen):
        assert main([phase, *FIXED, "--dataset", str(path), "--output-dir", str(tmp_path / path.name)]) == 3
        found = set(_OPTION.findall(said := capsys.readouterr().err)) - _OF_OTHERS
        assert found <= TRAININGS[phase], said
        named |= found
    assert {"--volume", "--nan-to-zero", "--ignore-affine", "--voxel-size", "--missing-chunks"} <= named


def test_errors_of_brats_files(tmp_path, capsys):
    """Cases are taken as they are published: the remedy is to fetch them again."""
    make_brats(tmp_path / "brats", "2021", 3)
    for scan in sorted((tmp_path / "brats").rglob("*flair*")):
        image = nib.load(scan)
        values = np.asarray(image.dataobj, np.float32)
        values[0, 0, 0] = np.nan
        nib.save(nib.Nifti1Image(values, image.affine), scan)
    arguments = [tmp_path / "brats", "--crop", 8, 8, 8, "--split", "train"]
    said = messages(capsys, "evaluate-brats", *arguments)
    assert "NaN" in said and "download the case again" in said, said
    assert set(_OPTION.findall(said)) <= options_of("evaluate-brats"), said
    options = [*FIXED, "--crop", "8", "8", "8", "--dataset", str(tmp_path / "brats")]
    assert main(["diffusion", *options, "--output-dir", str(tmp_path / "out")]) == 3
    assert "--nan-to-zero" not in capsys.readouterr().err


def test_errors_about_outputs(tmp_path, capsys, make_nifti, tiny_discovery):
    scan = make_nifti(tmp_path / "scan.nii.gz", files.phantom().astype(np.float32))
    file = tmp_path / "file"
    file.write_text("in the way")
    taken = tmp_path / "taken"
    taken.mkdir()
    for name in ("scan_dseg.nii.gz", "scan_stage1.nii.gz", "scan_report.html", "sample-000.nii.gz", "plan.json"):
        (taken / name).touch()
    (taken / "synthetic-regular-test-000.nii.gz").touch()
    (taken / "model_index.json").write_text("{}")
    cases = {
        "segment": lambda place: [scan, "-m", tiny_discovery, "-o", place],
        "features": lambda place: [scan, "--stage", 1, "-o", place],
        "report": lambda place: [scan, "--labels", taken / "scan_dseg.nii.gz", "-o", place],
        "generate": lambda place: ["-o", place],
        "synthesize": lambda place: ["-n", 1, "-o", place],
        "discover": lambda place: [scan, "-o", place],
        "pull": lambda place: ["user/name", place],
        "convert-authors-checkpoint": lambda place: [file, place],
        "import-authors-archive": lambda place: [tmp_path / "nothing", place],
    }
    for command, arguments in cases.items():
        for place in (file / "below", taken):
            said = messages(capsys, command, *arguments(place))
            assert str(place) in said or str(file) in said or "nothing" in said, said
            assert set(_OPTION.findall(said)) <= options_of(command), said
    for command in ("evaluate", "evaluate-brats"):
        said = messages(capsys, command, *([tmp_path] if "brats" in command else []), "-o", file)
        assert set(_OPTION.findall(said)) <= options_of(command), said
    for phase, options in TRAININGS.items():
        for place in (file / "below", *([taken] if phase != "brain" else [])):  # its models have folders of their own
            assert main([phase, "--mixed-precision", "no", "--dataset", str(scan), "--output-dir", str(place)]) in (
                3,
                4,
            )
            assert set(_OPTION.findall(said := capsys.readouterr().err)) <= options, said


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("segment", "diffdiscover3d.segmentation.preflight.refuse_early"),
        ("features", "diffdiscover3d.segmentation.preflight.refuse_early"),
        ("report", "diffdiscover3d.workflows.reports.make_reports"),
        ("discover", "diffdiscover3d.workflows.discover.discover"),
    ],
)
def test_options_about_reading_reach_the_function(command, function, tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(files.phantom(), np.eye(4)), tmp_path / "a.nii")
    taken = []

    def take(*_, **options):
        taken.append(options)
        raise InterruptedError

    monkeypatch.setattr(function, take)
    defaults = {"volume": None, "nan_to_zero": False, "ignore_affine": False, "series": None,
                "resolution": None if command == "discover" else 0, "missing_chunks": False,
                "voxel_size": None}  # fmt: skip
    given = {"volume": 2, "nan_to_zero": True, "ignore_affine": True, "series": "1.2.3", "resolution": 1,
             "missing_chunks": True, "voxel_size": "1,1,2mm"}  # fmt: skip
    flags = ["--volume", "2", "--nan-to-zero", "--ignore-affine", "--series", "1.2.3", "--resolution", "1",
             "--missing-chunks", "--voxel-size", "1,1,2mm"]  # fmt: skip
    where = [str(tmp_path / "a.nii"), "-o", str(tmp_path / "out")]
    for arguments in (where, where + flags):
        with pytest.raises(InterruptedError):
            COMMANDS[command].main(arguments, prog_name=command, standalone_mode=False)
    chosen = [{name: options[name] for name in defaults} for options in taken]
    assert chosen == [defaults, given]
