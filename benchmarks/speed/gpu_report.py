"""The GPU's part of docs/speed.md, from `gpu.json` and `operators.json`."""

import json
import re
from pathlib import Path

from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.training.config import DiffusionConfig, make_config

_KERNELS = 8  # lines of a profile


def gpu_section(results: Path) -> str:
    """Rows and profiles of `benchmarks/speed/gpu.py` and counts of operators; empty without results."""
    text = []
    if (results / "gpu.json").exists():
        text += _measured(json.loads((results / "gpu.json").read_text(encoding="utf-8")))
    if (results / "operators.json").exists():
        text += _counted(json.loads((results / "operators.json").read_text(encoding="utf-8")))
    return "\n".join(text)


def _measured(result: dict) -> list[str]:
    environment = result["environment"]
    text = [f"## {environment['gpu']} (torch {environment['packages']['torch']})\n"]
    rows = []
    for row in result["rows"]:
        bound = "at least" if row.get("at_least") else "at most"
        target = "" if row["target"] is None else f"{bound} {row['target']:g}"
        verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
        memory = [f"{row[k]:.2f} GiB" if row.get(k) else "" for k in ("peak_gib", "reserved_gib")]
        rows.append([row["what"], f"{row['value']:.4g} {row['unit']}", *memory, target, verdict])
    header = ["what", "value", "peak of tensors", "held, with graphs", "target", ""]
    text.append(markdown_table(header, rows))
    text.append(f"\n`{result['command']}`. Steps are those of the package's own loop. {result.get('note', '')}\n")
    text += _whole_training(result["rows"])
    for name, error in result["errors"].items():
        kinds = [line for line in error.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        text.append(f"*{name} failed: {(kinds or error.strip().splitlines())[-1][:200]}*\n")
    for name, detail in result["details"].items():
        if isinstance(detail, dict) and "profile" in detail:
            text += _profile(name, detail["profile"])
    return text


def _whole_training(rows: list[dict]) -> list[str]:
    """How long the diffusion model of the preset `paper` takes at the measured time of a step."""
    steps = make_config(DiffusionConfig, preset="paper").max_steps
    times = [r["value"] for r in rows if re.fullmatch("diffusion step, paper,.*: as by default", r["what"])]
    minutes = [f"{milliseconds * steps / 6e4:.0f} minutes" for milliseconds in times]
    return [f"At this rate the {steps:,} diffusion steps of the preset `paper` take {found}.\n" for found in minutes]


def _profile(name: str, profile: dict) -> list[str]:
    rows = [[f"`{k['name'][:80]}`", f"{k['ms']:.2f}", f"{k['count']:g}"] for k in profile["longest"][:_KERNELS]]
    title = f"**{name}**: {profile['ms']:.1f} ms of kernels, {profile['launches']:.0f} launches a step.\n"
    return [title, markdown_table(["kernel", "ms", "launches"], rows), ""]


def _counted(result: dict) -> list[str]:
    rows = [
        [preset, str(c["operators"]), str(c["casts"]), str(c["synchronising"]), f"{c['gflop'] / 1e3:.2f}"]
        for preset, c in result["presets"].items()
    ]
    header = ["preset", "dispatched operators", "casts", "synchronisations", "TFLOP"]
    features = [
        [r["preset"], str(r["stage"]), *(f"{r[k]:.3g}" for k in ("hooks_ms", "ours_ms", "times"))]
        for r in result["features"]
    ]
    return [
        "### A diffusion step on an accelerator, counted without one\n",
        markdown_table(header, rows),
        f"\n`python -m benchmarks.speed.operators`; batch of {result['batch']}, forward and backward pass.\n",
        "### Features of a stage on an accelerator, an estimate\n",
        markdown_table(["preset", "stage", "hooks, float32 (ms)", "bf16 (ms)", "times faster"], features),
        f"\nNothing was measured: least times of one volume at the measured peaks of an {result['peaks_of']}, each "
        "operator reading its inputs and writing its outputs once. Operators that a host launches one by one take "
        "longer; CUDA graphs avoid that.\n",
    ]
