"""Curves, bars and principal components."""

import json

import numpy as np
from PIL import Image

from diffdiscover3d.reporting.plots import components_as_rgb, save_dice_bars, save_loss_curves


def test_loss_curves(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": s, "lr": 1e-3, "loss": 1 / s, "feature": 0.5 / s} for s in range(1, 40)]
    rows[20]["confidence"] = 0.9
    log.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 40, "lo')
    save_loss_curves(tmp_path / "a.png", log)
    log.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "confidence"}) + "\n" for r in rows))
    save_loss_curves(tmp_path / "b.png", log)
    with Image.open(tmp_path / "a.png") as two, Image.open(tmp_path / "b.png") as one:
        assert two.width > 1.8 * one.width  # confidence has its own axes
        assert len(set(one.convert("RGB").getdata())) > 20
    log.write_text("")
    save_loss_curves(tmp_path / "c.png", log)
    assert not (tmp_path / "c.png").exists()


def test_higher_dice_draws_a_taller_bar(tmp_path):
    def inked(dice):
        rows = [
            {"level": level, "parts": 2**level, "method": name, "dice": d, "dice_std": 0.0}
            for level in (1, 2)
            for name, d in (("ours", dice), ("other", 0.5))
        ]
        save_dice_bars(tmp_path / "bars.png", rows)
        with Image.open(tmp_path / "bars.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        return int((np.abs(pixels - [0x00, 0x72, 0xB2]).sum(axis=-1) < 30).sum())  # the first method's blue

    low, high = inked(0.2), inked(0.8)
    assert 3 < high / low < 4.3


def test_principal_components_find_the_directions_of_variance():
    rng = np.random.default_rng(0)
    shape, sources = (6, 5, 4), rng.normal(size=(3, 120)) * np.array([[9.0], [3.0], [1.0]])
    mixing, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    rgb = components_as_rgb((mixing[:, :3] @ sources + 5).reshape(10, *shape))
    assert rgb.shape == (3, *shape) and rgb.min() >= 0 and rgb.max() <= 1
    for colour, source in zip(rgb.reshape(3, -1), sources, strict=True):
        assert abs(np.corrcoef(colour, source)[0, 1]) > 0.9


def test_fewer_than_three_channels_leave_grey():
    rgb = components_as_rgb(np.random.default_rng(0).normal(size=(1, 4, 3, 2)))
    assert (rgb[1:] == 0.5).all() and rgb[0].std() > 0.1
