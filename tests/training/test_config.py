"""Options: presets, files, flags and validation."""

import argparse
import dataclasses
import json

import pytest

from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.errors import InputError
from diffdiscover3d.models.config_schema import SCHEMAS
from diffdiscover3d.train import main
from diffdiscover3d.training.aliases import ABSENT, ALIASES, SAME_NAMES
from diffdiscover3d.training.brain_config import BrainConfig
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, as_dict, make_config
from diffdiscover3d.training.options import add_options, with_dashes


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


@pytest.mark.parametrize("kind", [DiffusionConfig, DiscoveryConfig, BrainConfig])
def test_the_options_of_brats_become_those_of_its_dataset(kind, tmp_path):
    assert make_config(kind).brats == BraTSOptions()
    written = {"dataset": "brats", "modality": "t1n", "grade": "all", "crop": [20, 22, 19], "clip_percentiles": [1, 99]}
    (tmp_path / "record.json").write_text(json.dumps(written))
    config = make_config(kind, file=tmp_path / "record.json")
    assert config.brats == BraTSOptions("t1", "all", (20, 22, 19), (1, 99))
    assert written.items() <= as_dict(config).items()
    with pytest.raises(ValueError, match="`modality` must be one of"):
        make_config(kind, modality="pd").brats  # noqa: B018


def test_every_option_is_a_flag():
    parser = argparse.ArgumentParser()
    add_options(parser, DiscoveryConfig)
    line = "--stages 1 3 --gamma-range 0.8 1.2 --no-flips --volume-size 32 --relative-consistency --resume latest"
    given = vars(parser.parse_args(line.split()))
    config = make_config(DiscoveryConfig, **given)
    assert config.stages == (1, 3) and config.gamma_range == (0.8, 1.2) and not config.flips
    assert config.volume_size == (32, 32, 32) and config.relative_consistency and config.resume == "latest"
    assert set(given) == {"stages", "gamma_range", "flips", "volume_size", "relative_consistency", "resume"}


# names of diffusers' example scripts


def parse(kind, line):
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    return make_config(kind, **vars(parser.parse_args(with_dashes(line.split()))))


def test_names_of_diffusers_set_the_same_options(monkeypatch, tmp_path):
    theirs = (
        "--train_data_dir some_scans --output_dir o_u_t --max_train_steps=7 --lr_scheduler polynomial --allow_tf32 "
        "--checkpointing_steps 3 --checkpoints_total_limit 5 --validation_steps 9 --dataloader_num_workers 2 "
        "--ddpm_num_steps 100 --no_random_flip --ema_max_decay 0.5"
    )
    ours = (
        "--dataset some_scans --output-dir o_u_t --max-steps 7 --lr-schedule polynomial --tf32 --checkpoint-every 3 "
        "--keep-checkpoints 5 --preview-every 9 --num-workers 2 --num-train-timesteps 100 --no-flips --ema-decay 0.5"
    )
    assert parse(DiffusionConfig, theirs) == parse(DiffusionConfig, ours)
    # diffusers' batch size is that of a process and micro-batch
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert parse(DiffusionConfig, "--gradient_accumulation_steps 4 --train_batch_size 2").batch_size == 24
    assert parse(DiffusionConfig, "--use_ema") == make_config(DiffusionConfig)
    assert parse(DiffusionConfig, "--no_use_ema").ema_decay == 0
    assert parse(DiffusionConfig, "--output_dir o --resume_from_checkpoint checkpoint-500").resume == (
        "o/checkpoints/checkpoint-00000500"
    )
    assert parse(DiffusionConfig, "--resume_from_checkpoint latest").resume == "latest"
    assert parse(DiscoveryConfig, "--pretrained_model_name_or_path user/cells").teacher == "user/cells"
    assert parse(DiffusionConfig, "--report_to tensorboard,wandb").trackers == ("tensorboard", "wandb")
    assert parse(DiffusionConfig, "--report_to none").trackers == ()
    # in files too, with options taking precedence
    file = tmp_path / "options.yaml"
    file.write_text("max_train_steps: 5\ntrain_batch_size: 2\nuse_ema: true\nlr-scheduler: linear\n")
    config = make_config(DiffusionConfig, file=file, gradient_accumulation_steps=2, max_train_steps=6)
    assert (config.max_steps, config.batch_size, config.lr_schedule) == (6, 12, "linear")
    with pytest.raises(ValueError, match="`train_batch_size` must be left out with `batch_size`"):
        make_config(DiffusionConfig, batch_size=1, train_batch_size=4)


def test_the_table_of_names_fits_the_options():
    fields = {
        kind: {f.name for f in dataclasses.fields(kind)} for kind in (DiffusionConfig, DiscoveryConfig, BrainConfig)
    }
    known = set().union(*fields.values())
    assert {alias.field for alias in ALIASES} | set(SAME_NAMES) <= known
    names = [alias.name for alias in ALIASES]
    assert len(set(names)) == len(names) and not (set(names) | set(ABSENT)) & known


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max_train_stepz 5", "unknown option --max-train-stepz; did you mean --max-train-steps?"),
        ("--learning-rat=1", None),  # an abbreviation
        ("--predction_type epsilon", "did you mean --prediction-type?"),
        ("--timestep 3", "--timestep is not an option of this training, but of discovery"),
        ("--hub_token=hf_secret", "--hub-token is not an option: a token on the command line can be read"),
        ("--num_processes 2", "accelerate launch --num_processes N"),
        ("--zzzz 5", "unknown option --zzzz ("),
        ("stray", "unexpected arguments"),
    ],
)
def test_unknown_options_are_explained(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["diffusion", "--dataset", "no-such-folder", *line.split()])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "hf_secret" not in error
    assert (code, error.count("no-such-folder")) == ((3, 1) if message is None else (2, 0))
    assert message is None or message in error


def test_later_options_are_recorded_only_if_they_are_set():
    """Records of trainings without them, and the hashes of these records, are those of earlier versions."""
    assert {"prediction_type", "adam_beta1", "push_to_hub", "lr_warmup_steps"} & as_dict(
        make_config(DiffusionConfig)
    ).keys() == set()
    assert as_dict(make_config(DiffusionConfig, snr_gamma=5.0))["snr_gamma"] == 5.0


def test_an_option_of_a_later_version_is_recorded_where_it_differs():
    assert "reliability" not in as_dict(make_config(DiscoveryConfig))
    assert as_dict(make_config(DiscoveryConfig, reliability="separation"))["reliability"] == "separation"


@pytest.mark.parametrize(
    ("kind", "name", "model"),
    [
        (DiffusionConfig, "num_train_timesteps", "DDPMScheduler"),
        (DiscoveryConfig, "num_parts", "StructureDiscoveryModel"),
    ],
)
def test_what_can_be_trained_can_be_loaded(kind, name, model):
    """The largest value of an option is the largest in the configuration of a saved model."""
    rule = SCHEMAS[model][name]
    largest = next(n for n in (65_536, 100_000) if rule(n) is None and rule(n + 1) is not None)
    kind(**{name: largest})
    with pytest.raises(ValueError, match=rf"`{name}` must be in 2\.\.{largest}, got"):
        kind(**{name: largest + 1})
