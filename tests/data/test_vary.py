"""Colour jitter and erasing: what they change, within their bounds, the same for the same generator."""

from __future__ import annotations

import numpy as np
import torch

from segvit.data.vary import AREA, erase, jitter


def test_jitter_keeps_to_its_strength() -> None:
    image = np.full((4, 5, 3), 100, np.uint8)  # gray: contrast and saturation leave it as it is
    levels = [int(jitter(image, 0.2, np.random.default_rng(i))[0, 0, 0]) for i in range(40)]
    assert 79 <= min(levels) < 90
    assert 110 < max(levels) <= 120
    again = jitter(image, 0.2, np.random.default_rng(3))
    assert np.array_equal(again, jitter(image, 0.2, np.random.default_rng(3)))
    colors = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    assert np.array_equal(jitter(colors, 0.0, np.random.default_rng(0)), colors)


def test_erase_takes_one_rectangle() -> None:
    shares = []
    for seed in range(60):
        image = torch.ones(3, 40, 60)
        erase(image, np.random.default_rng(seed))
        gone = image[0] == 0
        assert all(torch.equal(channel == 0, gone) for channel in image)
        rows, columns = gone.any(1), gone.any(0)
        assert torch.equal(gone, rows[:, None] & columns)
        shares.append(gone.float().mean().item())
    assert AREA[0] * 0.8 < min(shares) < 0.08
    assert 0.2 < max(shares) <= AREA[1] * 1.1
