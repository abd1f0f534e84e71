"""Precision and layout are measured, kept when resumed, and the same on every process."""

import itertools
import json

import pytest
import torch
from accelerate import Accelerator

from diffdiscover3d.training import precision
from diffdiscover3d.training.brain_config import BrainConfig
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.launch import make_accelerator
from diffdiscover3d.training.precision import choose, measure, settle_precision


def seconds(no_last, no_contiguous, bf16_last, bf16_contiguous):
    ways = itertools.product(("no", "bf16"), ("channels_last", "contiguous"))
    return dict(zip(ways, (no_last, no_contiguous, bf16_last, bf16_contiguous), strict=True))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (seconds(4, 5, 2, 3), ("bf16", "channels_last")),
        (seconds(4, 5, 3, 2), ("bf16", "contiguous")),
        (seconds(4, 2, 3, 3), ("no", "contiguous")),
        (seconds(2.0, 3, 1.9, 3), ("no", "channels_last")),  # too little gain for the rounding
    ],
)
def test_the_fastest_way_is_chosen(measured, expected):
    chosen = choose(measured)
    assert (chosen["mixed_precision"], chosen["memory_format"]) == expected


@pytest.mark.parametrize("probe", ["unet", "discovery"])
def test_a_measurement_leaves_no_trace(probe):
    measure.cache_clear()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = measure(torch.device("cpu"), probe)
    assert set(found) == set(seconds(0, 0, 0, 0)) and all(0 < s < 60 for s in found.values())
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def measured(monkeypatch):
    """Records the requested probes and returns fixed measurements."""
    asked = []

    def fake(device, probe):
        asked.append(probe)
        return seconds(4, 5, 2, 3)

    monkeypatch.setattr(precision, "measure", fake)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return asked


def test_each_stage_asks_for_its_own_network(measured, tmp_path):
    for kind in (DiffusionConfig, DiscoveryConfig):
        config = settle_precision(make_config(kind), tmp_path / "absent.json")
        assert (config.mixed_precision, config.memory_format) == ("bf16", "channels_last")
    assert measured == ["unet", "discovery"]


def test_what_was_asked_for_is_taken(measured, monkeypatch, tmp_path):
    config = make_config(DiffusionConfig, mixed_precision="no", memory_format="contiguous")
    assert settle_precision(config, tmp_path / "absent.json") is config and measured == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert settle_precision(make_config(DiffusionConfig), tmp_path / "absent.json").mixed_precision == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # set by `accelerate launch` without options
    assert settle_precision(make_config(DiffusionConfig), tmp_path / "absent.json").mixed_precision == "bf16"


@pytest.mark.parametrize("by", ["option", "launcher"])
@pytest.mark.parametrize("kind", [DiffusionConfig, DiscoveryConfig, BrainConfig])
def test_fp16_on_a_cpu_is_refused(kind, by, measured, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16" if by == "launcher" else "no")
    options = {"mixed_precision": "fp16"} if by == "option" else {}
    config = settle_precision(make_config(kind, **options), tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"fp16 needs a GPU; on a CPU give --mixed-precision bf16 or no"):
        make_accelerator(config)


def test_trainings_in_one_process_each_have_their_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for chosen in ("bf16", "no", "bf16"):
        accelerator = make_accelerator(make_config(DiffusionConfig, mixed_precision=chosen))
        with accelerator.autocast():
            product = torch.ones(2, 3) @ torch.ones(3, 2)
        assert product.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)


def test_a_training_follows_one_whose_accelerator_could_not_be_made(monkeypatch):
    def fail(*_):
        raise ImportError("the tracker's package is broken")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with monkeypatch.context() as broken:
        broken.setattr("accelerate.accelerator.filter_trackers", fail)
        with pytest.raises(ValueError, match="`report_to` is 'tensorboard', which cannot be used here: the tracker's"):
            make_accelerator(make_config(DiffusionConfig, mixed_precision="bf16", report_to="tensorboard"))
    assert make_accelerator(make_config(DiffusionConfig, mixed_precision="no")).mixed_precision == "no"


def test_the_accelerator_of_the_caller_is_left(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    own = Accelerator(mixed_precision="bf16")
    assert make_accelerator(make_config(DiffusionConfig, mixed_precision="bf16")).mixed_precision == "bf16"
    with pytest.raises(ValueError, match="`mixed_precision` is no and this process has an accelerator with bf16; give"):
        make_accelerator(make_config(DiffusionConfig, mixed_precision="no"))
    assert own.mixed_precision == "bf16"


@pytest.mark.parametrize("by", ["option", "launcher"])
def test_bf16_that_is_slower_is_told_with_its_factor(by, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(precision, "measure", lambda device, probe: seconds(2, 3, 6, 5))
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if by == "launcher" else "no")
    options = {"mixed_precision": "bf16"} if by == "option" else {}
    config = settle_precision(make_config(DiffusionConfig, **options), tmp_path / "absent.json")
    assert config.mixed_precision == "bf16"
    assert "bf16 takes 2.5 times as long as float32 on this CPU" in caplog.text
    caplog.clear()
    settle_precision(make_config(DiffusionConfig, mixed_precision="no"), tmp_path / "absent.json")
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: True)
    settle_precision(make_config(DiffusionConfig, mixed_precision="bf16"), tmp_path / "absent.json")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_bf16_instructions_are_read_from_the_flags(tmp_path):
    file = tmp_path / "cpuinfo"
    for flags, expected in (("fpu avx512f avx512_bf16 ssbd", True), ("fpu avx2 fma", False), ("asimd bf16 i8mm", True)):
        file.write_text(f"processor : 0\nflags\t: {flags}\n")
        assert precision.has_bf16_instructions(file) is expected
    assert not precision.has_bf16_instructions(tmp_path / "absent")


def test_a_resumed_training_keeps_its_choice(measured, tmp_path):
    written = tmp_path / "train_config.json"
    written.write_text(json.dumps({"mixed_precision": "no", "memory_format": "contiguous"}))
    resumed = settle_precision(make_config(DiffusionConfig, resume="latest"), written)
    assert (resumed.mixed_precision, resumed.memory_format) == ("no", "contiguous") and measured == []
    checkpoint = tmp_path / "checkpoint-00000002"
    checkpoint.mkdir()
    options = {"mixed_precision": "bf16", "memory_format": "contiguous"}
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "config": options}))
    resumed = settle_precision(make_config(DiffusionConfig, resume=str(checkpoint)), written)
    assert (resumed.mixed_precision, resumed.memory_format) == ("bf16", "contiguous") and measured == []
    written.write_text("torn")  # reported where all options are compared
    assert settle_precision(make_config(DiffusionConfig, resume="latest"), written).mixed_precision == "bf16"
