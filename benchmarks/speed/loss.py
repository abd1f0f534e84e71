"""The exact region consistency against Eq. 5 as written: time, peak memory, agreement.

    python -m benchmarks.speed.loss

Forward and backward of the loss with respect to the masks. Both ways take turns; peak memory is of one process for
each. The third case, three stages of a BraTS volume, does not fit when it is written directly.
"""

from collections.abc import Callable

import torch

from benchmarks.speed.baselines import eq5_from_features
from benchmarks.speed.timing import Benchmark, compare, compare_memory, interleave, peak_above, summarize
from diffdiscover3d.losses import region_consistency

# name: (parts, channels by coarse grid, voxel grid, whether Eq. 5 written directly fits, targets of time and memory)
CASES = {
    "K=8, C=256, 8^3 to 50^3": (8, [(256, (8, 8, 8))], (50, 50, 50), True, 50, 10),
    "K=3, C=128, 32^3 to 100^3": (3, [(128, (32, 32, 32))], (100, 100, 100), True, 20, None),
    "K=3, C=448 of three stages, 200x200x155": (
        3,
        [(256, (25, 25, 20)), (128, (50, 50, 39)), (64, (100, 100, 78))],
        (200, 200, 155),
        False,
        None,
        None,
    ),
}
WAYS = {"exact": region_consistency, "as written": eq5_from_features}
RIVAL = "Eq. 5 as written"


def make_ways(case: str, device: str, seed: int) -> dict[str, Callable[[], tuple[float, float]]]:
    """For each way a function that takes the loss and its gradient, and returns its value and the gradient's norm."""
    parts, maps, grid, *_ = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, parts, *grid, generator=generator).to(device).requires_grad_()
    features = [torch.randn(1, channels, *coarse, generator=generator).to(device) for channels, coarse in maps]

    def make(loss: Callable) -> Callable:
        def way() -> tuple[float, float]:
            logits.grad = None
            value = loss(logits.softmax(dim=1), features)
            value.backward()
            return value.item(), logits.grad.norm().item()

        return way

    return {name: make(loss) for name, loss in WAYS.items()}


def measure_memory(case: str, way: str, device: str, seed: int) -> dict:
    """Value, gradient and peak memory above the inputs of one way, in this process."""
    run = make_ways(case, device, seed)[way]
    found = []
    peak = peak_above(lambda: found.extend(run()), device)
    return {"value": found[0], "gradient_norm": found[1], "peak_above_inputs_mib": peak}


def main() -> None:
    """Every case: memory in processes of their own, then times in turns."""
    benchmark = Benchmark("loss", __doc__)
    options = benchmark.parse()
    if options.worker:
        return benchmark.answer(measure_memory(*options.worker, options.device, options.seed))
    rounds = options.rounds or (1 if options.quick else 7)
    rows, details = [], {}
    for case, (*_, fits, time_target, memory_target) in CASES.items():
        if options.quick and not fits:
            continue
        names = list(WAYS) if fits else ["exact"]
        found = {name: benchmark.worker(case, name) for name in names}
        ways = make_ways(case, options.device, options.seed)
        seconds = interleave({name: ways[name] for name in names}, rounds, 0 if options.quick else 1, options.device)
        details[case] = {name: {**found[name], **summarize(seconds[name])} for name in names}
        if not fits:
            continue
        exact, written = found["exact"], found["as written"]
        for figure in ("value", "gradient_norm"):
            if abs(exact[figure] - written[figure]) > 1e-3 * abs(written[figure]):
                raise SystemExit(f"{case}: the two ways differ in {figure}: {exact[figure]} and {written[figure]}.")
        rows.append(compare(case, RIVAL, seconds["as written"], seconds["exact"], time_target))
        peaks = (written["peak_above_inputs_mib"], exact["peak_above_inputs_mib"])
        rows.append(compare_memory(case, RIVAL, *peaks, memory_target))
    benchmark.write(rows, {"rounds": rounds, "agreement": "value and gradient norm within 1e-3 relative"}, **details)


if __name__ == "__main__":
    main()
