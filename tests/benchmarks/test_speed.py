"""The baselines compute what the package computes, and the harness counts and divides rightly."""

import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.speed.baselines import (
    PlainStep,
    add_noise,
    direct_discovery_losses,
    eq5_from_features,
    eq8,
    hooked_features,
    monai_diffusion_unet,
    padded_extent,
    upsample,
)
from benchmarks.speed.meter import Meter, count_flops
from benchmarks.speed.paced import Repeated, random_volumes, training_config, training_steps
from benchmarks.speed.report import write_report
from benchmarks.speed.run import BENCHMARKS, commands, is_fresh
from benchmarks.speed.timing import (
    absolute,
    code_version,
    compare,
    compare_memory,
    interleave,
    judge,
    module_of,
    ratio,
    run_worker,
    summarize,
)
from diffdiscover3d.losses import photometric_invariance, region_consistency
from diffdiscover3d.models.cpu_kernels import Conv3d
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig
from diffdiscover3d.training.data_order import draw_generator
from diffdiscover3d.training.diffusion import DiffusionTraining
from diffdiscover3d.training.discovery import DiscoveryTraining
from diffdiscover3d.training.launch import make_accelerator

GRID = (13, 18, 10)
TINY = {"width": 8, "channel_multipliers": (1, 2, 2), "attention": ("linear", None, "full"), "norm_groups": 4}


def tiny_unet(**options) -> UNet3DModel:
    torch.manual_seed(0)
    return UNet3DModel(**{**TINY, **options}).eval()


def masks(parts: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, parts, *GRID, dtype=torch.float64).softmax(dim=1)


@pytest.mark.parametrize("grid", [{}, {"sample_size": (8, 16, 12), "resize_before_noise": True}])
def test_hooked_features_are_the_pipelines(grid):
    unet = tiny_unet(**grid)
    pipe = DiffusionFeaturePipeline(unet, make_scheduler(250))
    volume = random_volumes(2, GRID, seed=1)
    noise = torch.randn(1, 2, 1, *(unet.noise_grid or GRID))
    noisy, steps = add_noise(pipe.scheduler, unet, volume, noise[0], 25)
    hooked, _ = hooked_features(unet, noisy, steps, (1, 2))
    found = pipe.extract(volume, noise, 25, (1, 2))
    assert tuple(found.extent) == padded_extent(unet, GRID)
    for ours, theirs in zip(found.features, hooked, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    early = pipe.extract(volume, noise, 25, (1,)).features[0]
    torch.testing.assert_close(early, hooked[0], rtol=1e-4, atol=1e-5)
    assert not unet.up_levels[0]._forward_hooks  # and the hooks are gone


def test_eq5_as_written_is_the_exact_consistency():
    torch.manual_seed(0)
    m, features = masks(), [torch.randn(2, 5, 4, 3, 6, dtype=torch.float64), torch.randn(2, 2, 7, 9, 5).double()]
    torch.testing.assert_close(eq5_from_features(m, features), region_consistency(m, features), rtol=1e-9, atol=0)


def test_eq8_as_written_is_the_invariance():
    a, b = masks().float(), masks().float()
    torch.testing.assert_close(eq8(a, b), photometric_invariance(a, b))


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper", "stages": (1, 2), "norm": "instance"},
        {"preset": "small", "stages": (2,), "denoised_timesteps": (40, 60)},
    ],
)
@pytest.mark.parametrize("grid", [{}, {"sample_size": (8, 16, 12), "resize_before_noise": True}])
def test_direct_discovery_losses_are_the_packages(options, grid, tmp_path):
    config = training_config(
        DiscoveryConfig,
        1,
        **{"num_parts": 3, "dropout": 0.0, "batch_size": 2, "mixed_precision": "no", "output_dir": str(tmp_path)},
        **options,
    )
    volumes = random_volumes(2, GRID, seed=2)
    data = Repeated(volumes)
    teacher = DiffusionFeaturePipeline(tiny_unet(**grid), make_scheduler(250))
    task = DiscoveryTraining(config, teacher, data, [data[0]], make_accelerator(config))
    drawn = [task.draw(v, draw_generator(3, 0, slot)) for slot, v in enumerate(volumes)]
    batch = {"volume": volumes, **{name: torch.stack([d[name] for d in drawn]) for name in drawn[0]}}
    model = task.model.train()
    package = task.losses(model, task.prepare(batch))
    direct = direct_discovery_losses(task.teacher.unet, task.teacher.scheduler, model, batch, config)
    assert package.keys() == direct.keys()
    for name in package:
        torch.testing.assert_close(package[name], direct[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_upsampling_aligns_the_corners_of_the_extent():
    line = torch.arange(3.0).reshape(1, 1, 3, 1, 1)
    assert upsample(line, (5, 1, 1)).flatten().tolist() == [0, 0.5, 1, 1.5, 2]
    assert upsample(line, (4, 1, 1), extent=(5, 1, 1)).flatten().tolist() == [0, 0.5, 1, 1.5]


def test_monais_network_has_our_widths_and_takes_our_volumes():
    pytest.importorskip("einops")  # MONAI's attention needs it
    unet = tiny_unet(attention=(None, None, None))
    model = monai_diffusion_unet(unet)
    assert model.block_out_channels == (8, 16, 16) and model.num_res_blocks == (2, 2, 2)
    assert model(torch.zeros(1, 1, 8, 12, 4), torch.tensor([25])).shape == (1, 1, 8, 12, 4)


def test_a_plain_step_is_adams_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    PlainStep(model, lambda: model(torch.full((1, 1), 5.0)).sum())()
    assert model.weight.item() == pytest.approx(1 - 1e-4, abs=1e-7)  # whatever the gradient, by the rate


def test_ways_take_turns_and_warm_up():
    calls = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]  # and each is first as often as the other
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_statistics_of_numbers_worked_out_by_hand():
    slow, fast = [4.0, 6.0, 8.0, 10.0, 100.0], [2.0, 2.0, 4.0, 4.0, 10.0]
    # medians 8 and 4; the ratios of the rounds are 2, 3, 2, 2.5, 10
    assert ratio(slow, fast) == {"ratio": 2.0, "low": 2.0, "high": 3.0}
    summary = summarize(fast, flops=8e12)
    assert summary["median"] == 4 and summary["quartiles"] == [2, 4] and summary["tflop_per_second"] == 2
    assert compare("x", "y", slow, fast, 2.5)["met"] is False and compare("x", "y", slow, fast)["met"] is None
    assert compare_memory("x", "y", 200.0, 10.0, 20)["met"] is True
    assert judge({"ratio": 1.0}, 1.0)["met"] is True


def test_operations_and_bytes_of_a_product_and_a_convolution():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with Meter() as meter:
        a @ b
    assert meter.total_flops == 2 * 3 * 5 * 7 and meter.total_bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    x, w = torch.randn(2, 3, 6, 5, 4), torch.randn(8, 3, 3, 3, 3)
    with Meter() as meter:
        F.conv3d(x, w, padding=1)
    voxels = 2 * 6 * 5 * 4
    assert meter.total_flops == 2 * voxels * 27 * 3 * 8
    assert meter.total_bytes == 4 * (3 * voxels + 8 * 3 * 27 + 8 * voxels)


def test_views_move_nothing_and_types_are_told_apart():
    x = torch.randn(4, 6)
    with Meter() as meter:
        x.reshape(6, 4).transpose(0, 1)[1:]
    assert meter.total_bytes == 0
    low = x.bfloat16()
    with Meter() as meter:
        meter.part = "product"
        low @ low.T
    assert dict(meter.parts["product"].flops) == {"bfloat16": 2 * 4 * 6 * 4}
    assert meter.total_bytes == 2 * (4 * 6 + 6 * 4 + 4 * 4)


def test_least_time_is_the_longer_of_computing_and_moving():
    peaks = {"flop_per_second": {"float32": 210.0}, "bytes_per_second": 1e9}
    with Meter(peaks) as meter:
        torch.randn(3, 5) @ torch.randn(5, 7)
    assert math.isclose(meter.parts["all"].least_seconds, 1.0, rel_tol=1e-4)


def test_the_meter_counts_what_torch_counts():
    unet, x, t = tiny_unet().train(), torch.randn(1, 1, 8, 12, 8), torch.tensor([25])

    def step():
        unet(x, t).sample.square().mean().backward()

    with Meter() as meter:
        step()
    assert meter.total_flops == count_flops(step) > 0


def test_the_packages_own_loop_is_timed_between_the_baselines_turns():
    turns = []
    config = training_config(
        DiffusionConfig, 5, preset="small", width=8, sample_size=8, batch_size=2, mixed_precision="no"
    )
    seconds = training_steps(
        lambda config, accelerator: DiffusionTraining(config, (8, 8, 8)),
        config,
        Repeated(random_volumes(2, (8, 8, 8), seed=0)),
        {"baseline": lambda: turns.append(1)},
        warmup=2,
    )
    assert len(turns) == 4 and {name: len(s) for name, s in seconds.items()} == {"package": 2, "baseline": 2}
    assert min(seconds["package"]) > max(seconds["baseline"])


def result(name: str, rows=(), **details) -> dict:
    """A result as written by a benchmark script."""
    environment = {"cpu_cores": 2, "threads": 2, "gpu": None, "packages": {"torch": "2.99"}}
    made = {
        "name": name,
        "device": "cpu",
        "command": f"python -m benchmarks.speed.{name}",
        "quick": False,
        "rows": rows,
    }
    made |= {"details": details, "environment": environment}
    return made | {"load_average_before": [0.25] * 3, "load_average_after": [1.0] * 3}


def test_the_report_is_of_what_there_is(tmp_path):
    rows = [
        compare("a case", "a baseline", [6.0, 6.0], [2.0, 2.0], 2.0),
        compare_memory("a case", "a baseline", 10.0, 5.0, 4.0),
    ]
    (tmp_path / "speed-loss.json").write_text(json.dumps(result("loss", rows)))
    page = write_report(tmp_path, tmp_path / "docs", ("loss", "features")).read_text()
    line = "| a case | a baseline | time | 2 s | 6 s | 3.00 [3.00, 3.00] | at least 2 | met |"
    assert line in page and "2.00 | at least 4 | **missed** |" in page
    assert "`python -m benchmarks.speed.features`" in page and "torch 2.99" in page and "CUDA" not in page
    assert (tmp_path / "docs" / "speed" / "ratios-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_what_a_gpu_took_and_counts(tmp_path):
    rows = [
        {
            "what": "a step",
            "value": 101.86,
            "unit": "ms",
            "target": 60.0,
            "met": False,
            "peak_gib": 2.233,
            "reserved_gib": 6.9,
        },
        {"what": "features", "value": 3.5, "unit": "times", "target": 3.0, "met": True, "at_least": True},
    ]
    for options, value in (("as by default", 60.0), ("tf32 True", 9.0)):
        what = f"diffusion step, paper, 64^3: {options}"
        rows.append({"what": what, "value": value, "unit": "ms", "target": None, "met": None})
    profile = {"ms": 96.53, "launches": 1717.0, "longest": [{"name": "gemm<8>", "ms": 12.918, "count": 34.0}]}
    found = {
        "command": "python -m benchmarks.speed.gpu",
        "environment": {"gpu": "NVIDIA H99", "packages": {"torch": "2.99"}},
        "rows": rows,
        "details": {"seconds of a step": 3.0, "a step": {"waits": [], "profile": profile}},
        "errors": {"segment": "Traceback\nValueError: no scan\nmore advice"},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    counts = {"operators": 1583, "casts": 1, "synchronising": 0, "gflop": 8844.45}
    features = [{"preset": "small", "stage": 2, "hooks_ms": 0.4648, "ours_ms": 0.0531, "times": 8.753}]
    counted = {"batch": 4, "presets": {"paper": counts}, "features": features, "peaks_of": "NVIDIA H99"}
    (tmp_path / "operators.json").write_text(json.dumps(counted))
    page = write_report(tmp_path, tmp_path / "docs", ()).read_text()
    assert "## NVIDIA H99 (torch 2.99)" in page
    assert "| a step | 101.9 ms | 2.23 GiB | 6.90 GiB | at most 60 | **missed** |" in page
    assert "| features | 3.5 times |  |  | at least 3 | met |" in page
    assert "| `gemm<8>` | 12.92 | 34 |" in page and "96.5 ms of kernels, 1717 launches" in page
    assert "*segment failed: ValueError: no scan*" in page
    assert (
        "At this rate the 50,000 diffusion steps of the preset `paper` take 50 minutes." in page
        and page.count("minutes") == 1
    )
    assert "| paper | 1583 | 1 | 0 | 8.84 |" in page
    assert "| small | 2 | 0.465 | 0.0531 | 8.75 |" in page and "Nothing was measured" in page


def test_the_report_of_budget_and_costs(tmp_path):
    row = {"part": "entry", "seconds": 2.0, "least_seconds": 0.5, "gflop": 3.0, "gb": 0.1, "fraction_of_roofline": 0.25}
    found = {"parts": [row], "seconds": 2.0, "fraction_of_roofline": 0.25, "operators": [{"operator": "a", "share": 1}]}
    found["largest_gap"] = {"part": "entry", "seconds_above_least": 1.5}
    peaks = {"gflop_per_second_of": {"float32": {"matmul": 100.0}}, "bytes_per_second": 2e10}
    recipe = {"hours_at_fraction_of_dense_bf16": {"20%": 1.5}, "total_flop": 4e17}
    recipe |= {"assumed_dense_bf16_flop_per_second": 99e13, "parts": {"x": {"steps": 9, "flop_of_a_step": 1e12}}}
    budget = result("budget", peaks=peaks, budgets={"a step": found}, paper_recipe=recipe)
    cost = {"shape": [8, 9, 7], "voxels": 504, "seconds": 1.0, "peak_gb": 0.5, "ns_per_voxel": 30.0}
    costs = result("segment-cost", [absolute("a scan", "s", [2.0, 1.0, 9.0], 3.0)], costs=[cost])
    for made in (budget, costs):
        (tmp_path / f"speed-{made['name']}.json").write_text(json.dumps(made))
    page = write_report(tmp_path, tmp_path / "docs", BENCHMARKS).read_text()
    assert "| entry | 2000.0 | 500.0 | 25% | 3.00 | 0.10 |" in page and "largest gap: entry (1.500 s" in page
    assert "| a scan | 2 s | 1 to 9 | at most 3 | met |" in page and "an estimate, nothing was measured" in page
    names = {"budget-cpu.png", "cost-per-voxel-cpu.png"}  # no ratio was measured
    assert {p.name for p in (tmp_path / "docs" / "speed").iterdir()} == names


def test_only_results_of_this_very_code_are_fresh(tmp_path):
    result = tmp_path / "speed-loss.json"
    assert not is_fresh(result, "loss")
    result.write_text('{"code": "of another day"}')
    assert not is_fresh(result, "loss")
    result.write_text(json.dumps({"code": code_version("loss")}))
    assert is_fresh(result, "loss") and not is_fresh(result, "features")
    result.write_text("torn")
    assert not is_fresh(result, "loss")


def test_every_benchmark_has_a_command_and_trials_lie_apart():
    assert [name for name, *_ in commands("cpu", quick=False)] == list(BENCHMARKS)
    for _, _, command in commands("cpu", quick=True):
        assert importlib.util.find_spec(command[2]) and command[-1] == "--quick"
    results = {result for _, result, _ in commands("cpu", quick=False)}
    assert not results & {result for _, result, _ in commands("cpu", quick=True)}
    assert "scaling" not in [name for name, *_ in commands("cuda", quick=False)]


def test_a_worker_answers_from_a_process_of_its_own():
    """The losses of one case, in float32 at a small size; the worker prints them as JSON."""
    found = run_worker(module_of("discovery-step"), "--quick", "--worker", "losses", "the small preset, fresh")
    assert found["package"]["loss"] == pytest.approx(found["direct"]["loss"], rel=1e-4)


@torch.no_grad()
def test_convolutions_of_a_single_volume_are_counted():
    convolution, volume = Conv3d(4, 6, 3, padding=1), torch.randn(1, 4, 5, 6, 7)
    expected = 2 * 4 * 6 * 27 * 5 * 6 * 7
    assert count_flops(lambda: convolution(volume)) == expected
    with Meter() as meter:
        convolution(volume)
    assert meter.total_flops == expected
