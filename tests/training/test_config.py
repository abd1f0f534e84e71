"""Options: presets, files, flags and validation."""

import argparse
import json

import pytest

from diffdiscover3d.errors import InputError
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, as_dict, make_config
from diffdiscover3d.training.options import add_options


def test_defaults_are_the_papers():
    diffusion, discovery = make_config(DiffusionConfig), make_config(DiscoveryConfig)
    assert (diffusion.max_steps, diffusion.batch_size, diffusion.learning_rate) == (50_000, 4, 1e-4)
    assert diffusion.num_train_timesteps == 250
    assert (discovery.learning_rate, discovery.timestep, discovery.gamma_range) == (3e-4, 25, (0.9, 1.1))
    assert discovery.lambda_feature == discovery.lambda_visual == discovery.lambda_invariance == 1
    assert not discovery.relative_consistency and discovery.lambda_denoised == discovery.invert_probability == 0


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("preset: small\nmax-steps: 77\nlearning_rate: 0.5\nvolume_size: [8, 9, 10]\n")
    config = make_config(DiffusionConfig, file=file, learning_rate=0.25)
    assert (config.preset, config.max_steps, config.learning_rate) == ("small", 77, 0.25)
    assert config.lr_schedule == "one_cycle" and config.volume_size == (8, 9, 10)


def test_yaml_numbers_become_what_the_options_are(tmp_path):
    file = tmp_path / "options.yml"
    file.write_text("learning_rate: 1e-4\nstages: 2\nlambda_visual: 1\nreport_to: null\nmax_steps: '7'\n")
    config = make_config(DiscoveryConfig, file=file)
    assert config.learning_rate == 1e-4 and config.stages == (2,) and config.max_steps == 7
    assert isinstance(config.lambda_visual, float) and config.report_to is None


def test_a_config_written_as_json_reads_back(tmp_path):
    config = make_config(DiscoveryConfig, stages=(1, 3), num_parts=5, teacher="somewhere")
    (tmp_path / "c.json").write_text(json.dumps(as_dict(config)))
    assert make_config(DiscoveryConfig, file=tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"max_stepz": 1}', "max_stepz"),
        ("a.json", "max_steps: 1", r"\.yaml"),
        ("a.yaml", "a: [1", "not valid YAML"),
        ("a.yaml", "- 1", "must map"),
        ("a.yaml", "max_steps: many", "max_steps"),
        ("a.yaml", "max_steps: 1.5", "max_steps"),
        ("a.yaml", "flips: 3", "flips"),
        ("absent.json", None, "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        make_config(DiffusionConfig, file=tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DiffusionConfig, {"max_steps": 0}),
        (DiffusionConfig, {"learning_rate": 0.0}),
        (DiffusionConfig, {"lr_schedule": "triangular"}),
        (DiffusionConfig, {"lr_warmup_steps": 5}),
        (DiffusionConfig, {"adam_beta2": 1.0}),
        (DiffusionConfig, {"adam_epsilon": 0.0}),
        (DiffusionConfig, {"prediction_type": "noise"}),
        (DiffusionConfig, {"snr_gamma": 0.0}),
        (DiffusionConfig, {"num_train_epochs": 0}),
        (DiffusionConfig, {"report_to": "tensorboards"}),
        (DiffusionConfig, {"hub_model_id": "user/name"}),
        (DiffusionConfig, {"memory_format": "channels_last", "use_8bit_adam": True}),
        (DiscoveryConfig, {"num_train_epochs": 3, "objective": "assignment"}),
        (DiffusionConfig, {"mixed_precision": "fp8"}),
        (DiffusionConfig, {"volume_size": (4, 5)}),
        (DiffusionConfig, {"ema_decay": 1.0}),
        (DiffusionConfig, {"preset": "huge"}),
        (DiffusionConfig, {"keep_checkpoints": 0}),
        (DiffusionConfig, {"save_dtype": "int8"}),
        (DiffusionConfig, {"sample_size": 64, "pad": True}),
        (DiscoveryConfig, {"norm": "layer"}),
        (DiscoveryConfig, {"num_parts": 1}),
        (DiscoveryConfig, {"stages": ()}),
        (DiscoveryConfig, {"gamma_range": (1.1, 0.9)}),
        (DiscoveryConfig, {"lambda_visual": -1.0}),
        (DiscoveryConfig, {"num_noise": 0}),
        (DiscoveryConfig, {"invert_probability": 1.5}),
        (DiscoveryConfig, {"children": (1, 3)}),
        (DiscoveryConfig, {"parent": "coarse", "init_from": "start"}),
        (DiscoveryConfig, {"parent": "coarse", "children": (1, 3), "init_from": "start"}),
    ],
)
def test_rules_name_option_and_value(kind, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"`{name}` must be") as error:
        make_config(kind, **options)
    assert repr(value) in str(error.value) or str(value) in str(error.value)


def test_every_option_is_a_flag():
    parser = argparse.ArgumentParser()
    add_options(parser, DiscoveryConfig)
    line = "--stages 1 3 --gamma-range 0.8 1.2 --no-flips --volume-size 32 --relative-consistency --resume latest"
    given = vars(parser.parse_args(line.split()))
    config = make_config(DiscoveryConfig, **given)
    assert config.stages == (1, 3) and config.gamma_range == (0.8, 1.2) and not config.flips
    assert config.volume_size == (32, 32, 32) and config.relative_consistency and config.resume == "latest"
    assert set(given) == {"stages", "gamma_range", "flips", "volume_size", "relative_consistency", "resume"}
