"""The UNet under torch.compile and FSDP."""

import subprocess
import sys

import pytest
import torch

from diffdiscover3d.models.unet_3d import UNet3DModel

SMALL = {"width": 8, "channel_multipliers": (1, 2), "norm_groups": 4}


@pytest.mark.parametrize(
    "options",
    [
        {"attention": (None, None)},
        {"attention": ("linear", "full"), "sample_size": 8, "resize_before_noise": True},
    ],
)
def test_the_unet_compiles_without_a_graph_break(options):
    torch.manual_seed(0)
    unet = UNet3DModel(**SMALL, **options)
    inputs = torch.randn(2, 1, 9, 12, 7), torch.tensor([3, 200])
    expected = unet(*inputs, stages=(1,))
    compiled = torch.compile(unet, backend="eager", fullgraph=True)  # fullgraph: a break is an error
    found = compiled(*inputs, stages=(1,))
    torch.testing.assert_close(found.sample, expected.sample)
    torch.testing.assert_close(found.features, expected.features)
    assert found.extent == expected.extent


@pytest.mark.slow
def test_a_discovery_training_compiles(tmp_path):
    """With dropout, which breaks the graph into several compiled pieces."""
    command = [sys.executable, "-m", "diffdiscover3d.train", "discovery", "--preset", "small", "--compile", "--quiet"]
    command += ["--teacher", "synthetic-regular", "--max-steps", "1", "--batch-size", "2", "--preview-every", "0"]
    command += ["--volume-size", "18", "16", "14", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out" / "selection.json").exists()


_SHARDED_STEP = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffdiscover3d.models.unet_3d import UNet3DModel

def step(shard):
    torch.manual_seed(0)
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=("linear", None), norm_groups=4)
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for level in (*unet.down_levels, *unet.up_levels):
            fully_shard(level, mesh=mesh)
        fully_shard(unet, mesh=mesh)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-3)
    x = torch.randn(2, 1, 9, 12, 7, generator=torch.Generator().manual_seed(1))
    loss = (unet(x, torch.tensor([3, 7])).sample - x).abs().mean()
    loss.backward()
    optimizer.step()
    return loss.item(), {k: v.full_tensor() if shard else v for k, v in unet.state_dict().items()}

dist.init_process_group("gloo")
(loss, weights), (sharded_loss, sharded) = step(False), step(True)
assert abs(loss - sharded_loss) < 1e-6
differing = [k for k in weights if not torch.allclose(weights[k], sharded[k], atol=2.5e-3)]
assert not differing, differing
moved = sum(float((weights[k] - sharded[k]).abs().sum()) for k in weights) / sum(w.numel() for w in weights.values())
assert moved < 1e-4, moved  # a step of Adam moves each weight by 1e-3; rounding decides where a gradient is nearly 0
print(f"rank {dist.get_rank()} done")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")
def test_one_step_of_the_unet_under_fsdp_on_two_processes(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(_SHARDED_STEP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rank 0 done" in done.stdout and "rank 1 done" in done.stdout
