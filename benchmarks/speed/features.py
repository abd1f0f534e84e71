"""Features of a stage with the pipeline, which stops there, against the whole network with forward hooks.

    python -m benchmarks.speed.features

Same weights, same noise, same outputs (asserted), float32. The first baseline is the network in torch's own layers, as
in the authors' code. The second also upsamples all channels to the voxels, which is needed to compare features with
masks. The third hooks the package's network. The networks are the paper's (width 64, attention at every level) at 64^3
and the `small` preset at 48^3.

The gain of stopping early is bounded by the share of operations after the stage (`flop_ratio` in the details); the
third baseline measures it. The remaining gain comes from the package's convolutions, which avoid torch's slow path for
a single small volume (`models.blocks.Conv3d`). Rows without a target show variants: the same pipeline with weights in
channels-last, whose features are equal up to the order of sums, and in bfloat16, whose features differ by rounding
(`difference`).
"""

import torch

from benchmarks.speed.baselines import add_noise, hooked_features, upsample
from benchmarks.speed.meter import count_flops
from benchmarks.speed.timing import Benchmark, compare, interleave, summarize
from diffdiscover3d.models.cpu_kernels import Conv3d
from diffdiscover3d.models.unet_3d import UNET_PRESETS, UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler

TIMESTEP = 25
TARGETS = {1: 2.0, 2: 1.5, 3: None}  # by stage
WHOLE, UPSAMPLED = "plain layers, whole, with hooks", "the same, all channels on the voxels"
OWN = "the package's network, whole, with hooks"
VARIANTS = ("package channels-last", "package bf16")
TOLERANCE = 1e-3  # relative to the features' norm, in float32


def make_pipeline(preset: str, seed: int, device: str) -> DiffusionFeaturePipeline:
    """A pipeline of an untrained network: speed does not ask what the weights are."""
    torch.manual_seed(seed)
    return DiffusionFeaturePipeline(UNet3DModel(**UNET_PRESETS[preset]).eval(), make_scheduler(250)).to(device)


def make_ways(preset: str, stage: int, volume: torch.Tensor, noise: torch.Tensor, seed: int) -> dict:
    """The package's pipeline, the two baselines with a copy of its weights, and the pipeline's variants."""
    device, grid = volume.device, tuple(volume.shape[2:])
    pipe, baseline = (make_pipeline(preset, seed, device) for _ in range(2))
    Conv3d.release(baseline.unet)
    last, low = (make_pipeline(preset, seed, device) for _ in range(2))
    last.unet.to(memory_format=torch.channels_last_3d)
    torch.nn.Module.to(low.unet, torch.bfloat16, memory_format=torch.channels_last_3d)

    def hooked(unet: UNet3DModel = baseline.unet) -> torch.Tensor:
        noisy, steps = add_noise(baseline.scheduler, unet, volume, noise[0], TIMESTEP)
        return hooked_features(unet, noisy, steps, (stage,))[0][0]

    return {
        "package": lambda: pipe.extract(volume, noise, TIMESTEP, (stage,)).features[0],
        WHOLE: hooked,
        UPSAMPLED: lambda: upsample(hooked(), grid),
        OWN: lambda: hooked(pipe.unet),
        "package channels-last": lambda: last.extract(volume, noise, TIMESTEP, (stage,)).features[0],
        "package bf16": lambda: low.extract(volume, noise, TIMESTEP, (stage,)).features[0],
    }


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of two feature maps relative to the second's norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def main() -> None:
    """Every preset and stage; the outputs are compared before anything is timed."""
    benchmark = Benchmark("features", __doc__)
    options = benchmark.parse()
    rounds = options.rounds or (2 if options.quick else 9)
    rows, details = [], {}
    cases = {"small": 48}
    if options.device != "cpu" and not options.quick:  # on a CPU the paper's network takes longer than all the rest
        cases["paper"] = 64
    for preset, side in cases.items():
        generator = torch.Generator().manual_seed(options.seed)
        volume = torch.rand(1, 1, side, side, side, generator=generator).to(options.device)
        noise = torch.randn(1, *volume.shape, generator=generator).to(options.device)
        for stage, target in TARGETS.items():
            ways = make_ways(preset, stage, volume, noise, options.seed)
            with torch.no_grad():
                expected = ways[WHOLE]()
                differs = {name: difference(ways[name](), expected) for name in ("package", *VARIANTS)}
                if differs["package"] > TOLERANCE:
                    raise SystemExit(f"{preset}, stage {stage}: features differ by {differs['package']:.1e}.")
                flops = {name: count_flops(way) for name, way in ways.items()}
                seconds = interleave(ways, rounds, 1, options.device)
            what = f"stage {stage}, {preset}, {side}^3"
            details[what] = {name: summarize(s, flops[name]) for name, s in seconds.items()}
            details[what] |= {"flop_ratio": flops[WHOLE] / flops["package"], "difference": differs}
            rows.append(compare(what, WHOLE, seconds[WHOLE], seconds["package"], target))
            rows.append(compare(what, OWN, seconds[OWN], seconds["package"], target))
            rows.append(compare(what, UPSAMPLED, seconds[UPSAMPLED], seconds["package"]))
            for name in VARIANTS:
                rows.append(compare(f"{what}, {name}", WHOLE, seconds[WHOLE], seconds[name]))
    benchmark.write(rows, {"timestep": TIMESTEP, "rounds": rounds, "tolerance": TOLERANCE}, **details)


if __name__ == "__main__":
    main()
