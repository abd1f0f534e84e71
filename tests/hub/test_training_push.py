"""Trainings that push their models to a Hub on 127.0.0.1, with the options as in diffusers' example scripts."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.helpers.loopback_hub import TOKEN
from tests.helpers.training_runs import write_scans

# the Hub runs in the process of the trainings, which switches it off and on
SCRIPT = """
import contextlib, io, json, os, shlex, sys, time
from tests.helpers.loopback_hub import LoopbackHub

scans, root = sys.argv[1:]
answer = {}

def call(main, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        import logging
        logging.getLogger().handlers.clear()  # its handler would keep the stream of the call before
        code = main(*arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

with LoopbackHub() as hub:
    os.environ.update(hub.environment(root + "/cache", ACCELERATE_USE_CPU="true"))
    from diffdiscover3d.train import main

    small = "--preset small --width 8 --sample_size 8 --memory_format channels_last".split()
    answer["cells"] = call(main, ["diffusion", *small, *f'''
        --train_data_dir {scans} --output_dir {root}/cells --seed 7
        --max_train_steps=4 --train_batch_size 2 --gradient_accumulation_steps 2 --dataloader_num_workers 0
        --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2 --adam_beta1 0.95 --adam_beta2 0.99
        --adam_weight_decay 1e-2 --adam_epsilon 1e-7 --max_grad_norm 0.5 --mixed_precision no --allow_tf32 --use_ema
        --prediction_type v_prediction --snr_gamma 5.0 --gradient_checkpointing --validation_steps 4
        --checkpointing_steps 2 --checkpoints_total_limit 1 --report_to tensorboard
        --push_to_hub --hub_model_id user/cells --hub_private_repo --hub_strategy every_save'''.split()])
    answer["again"] = call(main, ["diffusion", *small, *f'''
        --train_data_dir {scans} --output_dir {root}/cells --resume_from_checkpoint checkpoint-4 --max_train_steps 4
        --hub_token {os.environ["HF_TOKEN"]}'''.split()])
    shared = f"--dataset_name {scans} --mixed_precision no --memory_format channels_last --validation_steps 0".split()
    parts = ["discovery", "--preset", "small", *shared, "--pretrained_model_name_or_path", root + "/cells"]
    answer["parts"] = call(main, [*parts, *f'''
        --output_dir {root}/parts --num_train_epochs 1 --train_batch_size 4 --push_to_hub'''.split()])
    first = ["diffusion", *small, *shared, "--max_train_steps", "2", "--checkpointing_steps", "1", "--push_to_hub"]
    first += ["--hub_model_id", "user/later", "--hub_strategy", "every_save", "--output_dir"]

    hub.down = True
    answer["down"] = call(main, [*first, root + "/down"])
    hub.down = False
    words = shlex.split(answer["down"]["err"].strip().splitlines()[-1].partition("push it by hand: ")[2])
    from typer.testing import CliRunner
    from diffdiscover3d.cli.app import app
    answer["by_hand"] = CliRunner().invoke(app, words[1:]).exit_code

    token = os.environ.pop("HF_TOKEN")
    answer["none"] = call(main, [*first, root + "/none"])
    os.environ["HF_TOKEN"] = "hf_of_somebody_else"
    answer["refused"] = call(main, [*first[:-1], "--hub_model_id", "user/other", "--output_dir", root + "/refused"])
    os.environ["HF_TOKEN"] = token
    answer["bad"] = call(main, [*first[:-1], "--hub_model_id", "../etc", "--output_dir", root + "/bad"])
    answer["repos"] = {}
    for (_, name), repo in hub.repos.items():
        commits = [repo.commits[oid] for oid in repo.commits]
        answer["repos"][name] = {"private": repo.private, "messages": repo.messages, "commits": [
            {path: len(content) if path.endswith("safetensors") else content.decode(errors="replace")
             for path, content in files.items()} for files in commits]}
        weights = [next((c for p, c in files.items() if p.endswith(".safetensors")), b"") for files in commits]
        answer["repos"][name]["different"] = len(set(weights))
print("ANSWER" + json.dumps(answer))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pushed")


@pytest.fixture(scope="module")
def answer(root):
    """All trainings in one process, because huggingface_hub reads its environment when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", SCRIPT, str(write_scans(root / "scans")), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=300)
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.partition("ANSWER")[2])


def test_options_of_diffusers_train_and_push(answer, root):
    assert answer["cells"]["code"] == 0, answer["cells"]["err"]
    assert answer["cells"]["out"].strip() == str(root / "cells")
    options = json.loads((root / "cells" / "train_config.json").read_text())
    expected = {"dataset": str(root / "scans"), "max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 2}
    expected |= {"lr_schedule": "cosine", "lr_warmup_steps": 2, "adam_beta1": 0.95, "adam_weight_decay": 0.01}
    expected |= {"prediction_type": "v_prediction", "snr_gamma": 5.0, "gradient_checkpointing": True, "tf32": True}
    expected |= {
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
        "preview_every": 4,
        "report_to": "tensorboard",
        "seed": 7,
    }
    assert {name: options[name] for name in expected} == expected
    assert [p.name for p in (root / "cells" / "checkpoints").iterdir()] == ["checkpoint-00000004"]
    assert list((root / "cells").rglob("events.out.tfevents*"))
    # the rates of diffusers' cosine schedule: 2 steps of warm-up, then half a cosine over 2 steps
    rows = [json.loads(line) for line in (root / "cells" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4 and rows[-1]["lr"] == pytest.approx(0.5e-3)


def test_models_are_pushed_at_checkpoints_and_at_the_end(answer):
    cells = answer["repos"]["user/cells"]
    assert cells["private"]
    assert cells["messages"] == ["Model after training step 2", "Upload diffusion model with diffdiscover3d"]
    assert cells["different"] == 3  # the empty repository, the model of step 2 and the last
    for files in cells["commits"][1:]:
        assert {"model_index.json", "README.md", "train_config.json", "unet/config.json"} <= set(files)
        assert json.loads(files["scheduler/scheduler_config.json"])["prediction_type"] == "v_prediction"
        assert 'from_pretrained("user/cells")' in files["README.md"]
    assert "--prediction-type v_prediction" in cells["commits"][-1]["README.md"]


def test_without_an_id_the_repository_is_called_as_the_folder(answer, root):
    assert answer["parts"]["code"] == 0, answer["parts"]["err"]
    parts = answer["repos"]["user/parts"]
    assert not parts["private"] and parts["messages"] == ["Upload discovery model with diffdiscover3d"]
    assert "config.json" in parts["commits"][-1]
    # one epoch of 6 scans in batches of 4
    assert json.loads((root / "parts" / "train_config.json").read_text())["max_steps"] == 2


def test_a_failing_push_keeps_the_training(answer, root):
    down = answer["down"]
    lines = down["err"].strip().splitlines()
    assert down["code"] == 6 and lines[-1].startswith("error: user/later: the push failed")
    assert any("the Hub cannot be reached" in line for line in lines)
    assert any("the model of step 1 is not pushed" in line for line in lines)
    assert (root / "down" / "model_index.json").is_file()
    words = shlex.split(lines[-1].partition("push it by hand: ")[2])
    assert words == ["diffdiscover3d", "push", str(root / "down"), "user/later"]
    assert answer["by_hand"] == 0
    assert answer["repos"]["user/later"]["messages"] == ["Upload diffusion model with diffdiscover3d"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("none", 6, "HF_TOKEN"), ("refused", 6, "refuses to create"), ("bad", 5, "hub_model_id")],
)
def test_what_cannot_be_pushed_is_refused_before_the_training(answer, root, name, code, message):
    assert answer[name]["code"] == code and message in answer[name]["err"].strip().splitlines()[-1]
    assert not (root / name).exists()


def test_the_token_is_neither_stored_nor_logged(answer, root):
    assert answer["again"]["code"] == 2 and "HF_TOKEN" in answer["again"]["err"]
    for call in answer.values():
        if isinstance(call, dict) and "err" in call:
            assert TOKEN not in call["err"] + call["out"]
    for path in root.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
