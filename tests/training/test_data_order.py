"""Data order and random draws: functions of (seed, step, slot) only."""

import pytest
import torch

from diffdiscover3d.training.data_order import StepBatches, TrainingVolumes, draw_generator, volume_index


def batches(rank=0, world=1, accumulation=1, start=0, stop=6, batch_size=4, length=10, seed=3):
    return list(StepBatches(length, batch_size, accumulation, rank, world, seed, start, stop))


def test_each_epoch_is_a_permutation():
    stream = [volume_index(0, i, 7) for i in range(21)]
    assert all(sorted(stream[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert stream[:7] != stream[7:14] and stream != [volume_index(1, i, 7) for i in range(21)]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_processes_and_accumulation_share_the_same_batch(world, accumulation):
    whole = batches()
    shares = [batches(rank, world, accumulation) for rank in range(world)]
    for step in range(6):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        together = [key for share in shares for batch in share[micro] for key in batch]
        assert sorted(together) == sorted(whole[step])
        assert all(len(batch) == 4 // (world * accumulation) for share in shares for batch in share[micro])


def test_a_resumed_run_sees_the_rest():
    assert batches(start=4) == batches()[4:]
    assert len(StepBatches(10, 4, 2, 0, 1, 0, 4, 6)) == 4


def test_a_batch_that_cannot_be_shared_is_named():
    with pytest.raises(ValueError, match="multiple of 3"):
        batches(world=3)


def test_generators_depend_on_all_three():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [torch.rand(4, generator=draw_generator(*key)) for key in keys]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    assert torch.equal(draws[2], torch.rand(4, generator=draw_generator(0, 1, 0)))


def test_items_are_flipped_and_drawn_the_same_each_time():
    source = [{"volume": torch.arange(24.0).reshape(1, 2, 3, 4)}]
    volumes = TrainingVolumes(source, lambda v, g: {"noise": torch.randn(v.shape, generator=g)}, 0, True, None)
    items = [volumes[0, step, 0] for step in range(20)]
    assert torch.equal(items[5]["noise"], volumes[0, 5, 0]["noise"])
    seen = {tuple(i["volume"].flatten().tolist()) for i in items}
    assert len(seen) > 4 and all(sorted(s) == list(range(24)) for s in seen)
    resized = TrainingVolumes(source, lambda v, g: {}, 0, False, (4, 6, 8))
    assert resized[0, 0, 0]["volume"].shape == (1, 4, 6, 8)
