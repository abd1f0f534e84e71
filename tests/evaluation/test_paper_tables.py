"""Benchmark tables: filling, resuming and summarising, with short trainings."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.evaluation import paper_tables as module
from diffdiscover3d.evaluation.methods import METHODS
from diffdiscover3d.evaluation.paper_tables import TABLES, Cell, PaperTable, benchmark, mean_over_seeds
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.reporting.score_tables import format_table
from diffdiscover3d.train import main as train_main
from diffdiscover3d.training.recipes import RECIPES, final_loss, train_level

SHORT = {"max_steps": 2, "num_noise": 1, "preview_every": 0, "denoised_timesteps": (25,)}


def train_here(arguments):
    assert train_main(list(arguments)) == 0


@pytest.fixture
def two_volumes(monkeypatch):
    """Two volumes per split, for speed."""
    monkeypatch.setattr("diffdiscover3d.data.datasets.synthetic.SPLITS", {"train": 2, "validation": 2, "test": 2})


def test_baselines_fill_a_table_once(tmp_path, two_volumes, monkeypatch):
    arguments = {"methods": ("k-means",), "levels": (1, 3), "seeds": (0, 1)}
    shown = []
    result = benchmark(tmp_path, on_row=lambda row, n, of: shown.append((n, of)), **arguments)
    assert shown == [(n, 8) for n in range(1, 9)] and len(result["rows"]) == 8
    assert {row["variant"] for row in result["rows"]} == {"regular", "irregular"}
    assert all(0 < row["dice_one_matching"] <= row["dice"] <= 1 for row in result["rows"])
    assert json.loads((tmp_path / "table.json").read_text())["summary"] == result["summary"]
    assert "| k-means | " in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    # a second run reads the results of the first without evaluating again
    monkeypatch.setattr(module, "score", None)
    again = benchmark(tmp_path, **arguments)
    assert again["rows"] == result["rows"]
    with pytest.raises(ModelError, match="different settings"):
        benchmark(tmp_path, split="validation", **arguments)


def test_a_nested_recipe_trains_each_level_inside_the_one_before(tmp_path, two_volumes):
    runs = []

    def run_training(arguments):
        runs.append(arguments)
        train_here(arguments)

    table = PaperTable(
        tmp_path, "small-consistency", teacher="synthetic-regular", overrides=SHORT, run_training=run_training
    )
    row = table.fill(Cell("regular", "ours", 2, 0))
    base = tmp_path / "models" / "regular" / "ours-seed0"
    assert [a[a.index("--output-dir") + 1] for a in runs] == [
        str(base / name) for name in ("level1-step1", "level1-step1-start2", "level1", "level2")
    ]
    better = min(("level1-step1", "level1-step1-start2"), key=lambda name: final_loss(base / name))
    assert runs[2][runs[2].index("--init-from") + 1] == str(base / better)
    assert load_discovery(str(base / "level2")).parents is not None
    assert row["parts"] == 4 and row["training_seconds"] > 0 and len(row["commands"]) == 1
    assert (
        "--parent models/regular/ours-seed0/level1 " in row["commands"][0] and str(tmp_path) not in row["commands"][0]
    )
    # another level of the same method reuses trained networks
    table.fill(Cell("regular", "ours", 1, 0))
    assert len(runs) == 4


def test_another_teacher_is_never_mixed_in(tmp_path, two_volumes):
    """The same folder with different weights, and a diffusion model trained with different options."""
    teacher = load_teacher("synthetic-regular")
    teacher.save_pretrained(tmp_path / "teacher")
    cell = Cell("regular", "features-k-means-all", 1, 0)
    row = PaperTable(tmp_path / "out", teacher=str(tmp_path / "teacher")).fill(cell)
    assert PaperTable(tmp_path / "out", teacher=str(tmp_path / "teacher")).fill(cell) == row
    with torch.no_grad():
        next(teacher.unet.parameters()).mul_(1.01)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ModelError, match="created with different settings"):
        PaperTable(tmp_path / "out", teacher=str(tmp_path / "teacher")).fill(cell)
    usual, wide = (PaperTable(tmp_path, diffusion_overrides=o).settings_of(METHODS["ours"]) for o in ({}, {"seed": 1}))
    assert usual["diffusion"] == dict(RECIPES["small"].diffusion) != wide["diffusion"]
    # k-means on intensities has no teacher
    assert "diffusion" not in PaperTable(tmp_path).settings_of(METHODS["k-means"])


def test_rivals_are_fitted_on_the_training_volumes(tmp_path, two_volumes, monkeypatch):
    fitted = []

    class Rival:
        def fit(self, volumes):
            fitted.append([volumes[i]["volume"].shape for i in range(len(volumes))])

        def predict(self, volume):
            return (volume[0] > 0.5).numpy().astype(np.uint8)

    method = module.Method("learned", lambda parts, teacher, seed: Rival(), needs_teacher=False)
    monkeypatch.setitem(METHODS, "learned", method)
    assert PaperTable(tmp_path).fill(Cell("regular", "learned", 1, 0))["dice"] > 0
    assert fitted == [[(1, 50, 50, 50)] * 2]


def test_only_the_folder_of_the_table_is_left_out_of_its_commands(tmp_path):
    table = PaperTable("out")
    assert table._strip_output_folder(["--teacher", "/data/about/x", "--output-dir", "out/models/a"]) == (
        "--teacher /data/about/x --output-dir models/a"
    )


def write_log(folder, *losses):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    (folder / "log.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(("losses", "winner"), [((0.8, 0.5), "-start2"), ((0.4, 0.5), "")])
def test_the_start_with_the_lowest_loss_goes_on(tmp_path, losses, winner):
    done = []

    def run(training):
        # low at first, as in a failed start: only the last quarter counts
        write_log(training.folder, 0.1, 0.1, 0.1, losses[len(done) % 2])
        done.append(training)

    recipe = dataclasses.replace(RECIPES["small-consistency"], starts=2)
    trainings = train_level(recipe, 1, "data", 7, "teacher", None, tmp_path / "level1", run)
    assert trainings == done and [t.options["seed"] for t in done] == [7, 7, 7]
    # other weights, and the same volumes and random draws: only then can the losses be compared
    assert [t.options.get("init_seed") for t in done] == [None, 1007, None]
    assert done[-1].options["init_from"] == tmp_path / f"level1-step1{winner}"
    assert done[-1].folder == tmp_path / "level1"


def test_the_last_quarter_of_a_log_is_what_counts(tmp_path):
    write_log(tmp_path / "a", 9, 9, 9, 9, 9, 9, 1, 2)
    assert final_loss(tmp_path / "a") == 1.5
    write_log(tmp_path / "b", 1, 1, 1, float("nan"))  # never selected, in either order
    assert final_loss(tmp_path / "b") == float("inf")


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "loss": 0.5}\n{"st', '{"step": 1}', "[]"])
def test_a_log_that_cannot_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ModelError, match=r"must contain the losses of a finished training.*remove"):
        final_loss(tmp_path)


def test_another_recipe_is_never_mixed_in(tmp_path, two_volumes, monkeypatch):
    table = PaperTable(
        tmp_path, "small-consistency", teacher="synthetic-regular", overrides=SHORT, run_training=train_here
    )
    table.fill(Cell("regular", "ours", 1, 0))
    name = "small-consistency"
    monkeypatch.setitem(RECIPES, name, RECIPES[name].changed(lambda_visual=0.5))
    with pytest.raises(ModelError, match="created with different settings"):
        table.fill(Cell("regular", "ours", 1, 0))
    with pytest.raises(ModelError, match="trained with different options"):
        table.fill(Cell("regular", "ours", 2, 0))


def test_an_ablation_keeps_something(tmp_path):
    with pytest.raises(ValueError, match="level 1 must keep a consistency"):
        RECIPES["small"].changed(lambda_visual=0.0, lambda_feature=0.0, lambda_denoised=0.0)
    # the preset of the paper has no denoised term
    with pytest.raises(ValueError, match="level 1 must keep a consistency"):
        RECIPES["paper"].changed(lambda_visual=0.0, lambda_feature=0.0)


def test_ablations_change_one_option():
    for name, option in (("no-visual", "visual"), ("no-feature", "feature"), ("no-invariance", "invariance")):
        assert METHODS[name].options == {f"lambda_{option}": 0.0} and name in TABLES[1]
    recipe = RECIPES["small"].changed(stages=(3,))
    assert all(step["stages"] == (3,) for steps in recipe.levels.values() for step in steps)
    assert RECIPES["small"].levels[1][0]["stages"] != (3,)
    # without the feature term, the training with only that term is dropped
    for name in ("small", "small-consistency"):
        usual, without = RECIPES[name], RECIPES[name].changed(lambda_feature=0.0)
        assert [len(usual.levels[level]) - len(without.levels[level]) for level in (1, 2, 3)] == [1, 0, 0]
        assert without.levels[1][0] == {**usual.levels[1][1], "lambda_feature": 0.0}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_recipes_are_command_lines(recipe, level, tmp_path):
    from diffdiscover3d.train import make_parser
    from diffdiscover3d.training.config import DiscoveryConfig, make_config

    trainings = train_level(
        dataclasses.replace(RECIPES[recipe], starts=1),
        level,
        "synthetic-regular",
        7,
        "teacher",
        tmp_path / "parent",
        tmp_path / "out",
        lambda training: None,
    )
    for training in trainings:
        options = vars(make_parser().parse_args(training.arguments()))
        for name in ("debug", "phase", "config", "quiet"):
            options.pop(name)
        config = make_config(DiscoveryConfig, **options)
        assert config.seed == 7 and config.num_parts == 2**level
    assert config.output_dir == str(tmp_path / "out")


def test_summary_is_mean_and_spread_over_seeds():
    common = {"variant": "regular", "method": "ours", "title": "M", "level": 1, "seconds": 1.0, "training_seconds": 2.0}
    rows = [
        {**common, "seed": seed, "dice": dice, "dice_one_matching": dice - 0.1}
        for seed, dice in enumerate((0.5, 0.7, 0.9))
    ]
    (summary,) = mean_over_seeds(rows)
    assert summary["dice"] == pytest.approx(0.7) and summary["dice_one_matching"] == pytest.approx(0.6)
    assert summary["dice_spread"] == pytest.approx(0.2) and summary["seeds"] == [0, 1, 2]
    assert "| M | 0.700 ± 0.200 (0.600) |" in format_table([summary])


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="unknown: nnunet"):
        benchmark(tmp_path, methods=("nnunet",))
    with pytest.raises(ValueError, match="`recipe` must be one of"):
        PaperTable(tmp_path, recipe="huge")


def test_a_training_that_fails_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"exit code 2: -m diffdiscover3d.train discovery --num-parts 1"):
        module.run_in_process(["discovery", "--num-parts", "1", "--output-dir", str(tmp_path / "x")])
