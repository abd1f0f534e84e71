"""Nothing made from a user's scans leaves by a push unless it is asked for."""

import json
import logging
import re
import shutil

import pytest

from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub.cards import DATASETS, escape_markdown, render_card
from diffdiscover3d.hub.upload import _files_to_push, _hide_paths, _is_synthetic
from tests.helpers.loopback_hub import LoopbackHub

UID = "1.2.840.113619.2.55.3"  # of a DICOM series


@pytest.fixture
def own_model(tmp_path, tiny_discovery):
    """A network trained on somebody's scans, with previews and a picture of them."""
    folder = shutil.copytree(tiny_discovery, tmp_path / "model")
    options = {"dataset": "/home/jane/patients", "preset": "small", "series": UID, "include": ["jane*"]}
    (folder / "train_config.json").write_text(json.dumps(options))
    (folder / "previews").mkdir()
    (folder / "previews" / "parts-00000100.png").write_bytes(b"a patient")
    (folder / "preview.png").write_bytes(b"a patient")
    return folder


def test_links_out_of_the_folder_are_not_followed(own_model, tmp_path, caplog):
    secret = tmp_path / "notes.md"
    secret.write_text("secret")
    (own_model / "README.md").symlink_to(secret)
    with caplog.at_level(logging.WARNING, logger="diffdiscover3d"):
        names = {path.name for path in _files_to_push(own_model)}
    assert "README.md" not in names and "config.json" in names
    assert "README.md is not uploaded" in caplog.text


def test_files_of_the_hub_cache_are_links_into_it(own_model, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "0a1b", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(own_model / "config.json", blobs / "1234")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    assert [path.name for path in _files_to_push(snapshot)] == ["config.json"]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("synthetic-regular", True),
        ("synthetic", True),
        ("synthetic_patients", False),
        ("synthetic-regular/", False),
        ("brats", False),
        ("scans/", False),
    ],
)
def test_whose_pictures_may_be_published(own_model, dataset, expected):
    (own_model / "train_config.json").write_text(json.dumps({"dataset": dataset}))
    assert _is_synthetic(own_model) is expected


@pytest.mark.parametrize("with_pictures", [False, True])
def test_pushed_files(own_model, tmp_path, with_pictures):
    """A push in a process of its own, to a real server on this machine."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "diffdiscover3d.cli", "push", str(own_model), "user/own", "--quiet"]
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "hf")
        done = subprocess.run(
            [*command, *(["--with-pictures"] if with_pictures else [])], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        files = hub.repos["models", "user/own"].files("main")
    assert ("preview.png" in files) is with_pictures
    assert not any(secret in content for content in files.values() for secret in (b"jane", UID.encode()))


@pytest.mark.parametrize("name", DATASETS)
def test_a_folder_called_like_a_published_dataset(own_model, name):
    (own_model / "train_config.json").write_text(json.dumps({"dataset": f"/home/jane/{name}", "preset": "small"}))
    _hide_paths(own_model)
    card = render_card(own_model, "user/own")
    assert (
        "a collection of volumes that is not published" in card
        and "datasets:" not in card
        and "- synthetic" not in card
    )
    assert json.loads((own_model / "train_config.json").read_text())["dataset"] == "own-scans"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_config.json", b"\xff\xfe{", "cannot be read as JSON"),
        ("train_config.json", b'{"dataset": "x"', "cannot be read as JSON"),
        ("train_config.json", b'{"preset": {"a": 1}}', "`preset` must be of type str"),
        ("train_config.json", b'{"dataset": ["x"]}', "`dataset` must be of type str"),
        ("train_config.json", b'{"crop": 5}', "`crop` must be of type list"),
        ("scores.json", b'{"rows": 5}', "`rows` must be of type list"),
        ("scores.json", b'{"rows": [{"method": ["a"]}]}', "`method` must be of type str"),
        ("scores.json", b'{"rows": [{"method": "a", "parts": [2]}]}', "`parts` must be of type int"),
        ("scores.json", b'{"rows": [{"method": "a"}], "weights_sha256": [1]}', "`weights_sha256` must be of type dict"),
    ],
)
def test_damaged_files_are_named(own_model, name, content, message):
    (own_model / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        _hide_paths(own_model)
        render_card(own_model, "user/own")


HOSTILE = "](http://evil) <script>alert(1)</script> | `x`\n# heading"


def test_fields_of_a_card_are_plain_text(own_model):
    config = json.loads((own_model / "config.json").read_text())
    options = {"dataset": "own", "preset": "brats", "modality": HOSTILE, "norm": HOSTILE, "crop": [HOSTILE]}
    (own_model / "train_config.json").write_text(json.dumps(options))
    (own_model / "config.json").write_text(json.dumps({**config, "num_parts": HOSTILE}))
    scores = {"split": HOSTILE, "dataset": HOSTILE, "rows": [{"method": HOSTILE, "dice": 0.5, "parts": None}]}
    (own_model / "scores.json").write_text(json.dumps(scores))
    body = render_card(own_model, "user/own").split("---\n", 2)[2]
    outside = "".join(body.split("```")[::2])
    assert not re.search(r"(?<!\\)(<script|\]\(http://evil)", outside) and "\n# heading" not in outside
    assert "\n# heading" not in body.split("# own", 1)[1]


def test_escaped_markdown_shows_the_characters():
    assert escape_markdown("a|b `c` <d> [e](f) *g*\nh") == r"a\|b \`c\` \<d\> \[e\](f) \*g\* h"
    assert escape_markdown("k-means, all stages (2)") == "k-means, all stages (2)"
