"""Hostile configurations and flipped bits, counted: each must be refused, within seconds."""

import json
import random
import shutil
import time

import pytest

from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub import embedded_models
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from tests.helpers.training_runs import SEED
from tests.models.test_config_schema import DISCOVERY, SCHEDULER, UNET, cases, nested_parents

pytestmark = pytest.mark.slow
FILES = {
    "discovery/config.json": (DISCOVERY, load_discovery),
    "diffusion/unet/config.json": (UNET, load_teacher),
    "diffusion/scheduler/scheduler_config.json": (SCHEDULER, load_teacher),
}


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(embedded_models()["synthetic-regular"].folder, tmp_path / "model")


def is_refused(load, folder) -> bool:
    try:
        load(str(folder))
    except ModelError:
        return True
    return False


def test_configurations(model, count):
    for path in model.rglob("checksums.json"):
        path.unlink()
    texts = [
        (file, json.dumps({**json.loads((model / file).read_text()), name: value}), load)
        for file, (table, load) in FILES.items()
        for name, value in cases(table)
    ]
    for depth in (400, 10_000):
        texts.append(("discovery/config.json", nested_parents(depth), load_discovery))
    accepted, slowest = [], 0.0
    for file, text, load in texts:
        before, clock = (model / file).read_text(), time.perf_counter()
        (model / file).write_text(text)
        if not is_refused(load, model):
            accepted.append(f"{file}: {text[:200]}")
        slowest = max(slowest, time.perf_counter() - clock)
        (model / file).write_text(before)
    load_discovery(str(model))
    load_teacher(str(model))
    refused = len(texts) - len(accepted)
    count(
        "hostile configurations",
        configurations=len(texts), refused=refused, accepted=accepted, slowest_seconds=round(slowest, 2),
    )  # fmt: skip
    assert not accepted and slowest < 5


def test_flipped_bits(model, count):
    draw, files = random.Random(SEED), sorted(model.glob("*/**/*.safetensors"))
    missed = []
    for number in range(30):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        load = load_discovery if "discovery" in path.parts else load_teacher
        if not is_refused(load, model):
            missed.append([path.name, place, bit])
        path.write_bytes(whole)
    count("flipped bits", flips=30, found=30 - len(missed), missed=missed)
    assert not missed
