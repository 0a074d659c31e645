"""Mask losses against their formulas through plain autograd, in chunks and at other sizes than the labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.losses import binary
from segvit.losses.binary import focal_and_dice

sides = st.integers(1, 9)


def plain(
    maps: Tensor, masks: Tensor, pairs: Tensor, *, covers: tuple[int, int], alpha: float, gamma: float, smooth: float
) -> tuple[Tensor, Tensor]:
    logits = F.interpolate(maps[None], size=covers, mode="bilinear", align_corners=False)[0]
    p = logits[:, : masks.shape[1], : masks.shape[2]].sigmoid()
    targets = masks[pairs[:, 0]] == pairs[:, 1, None, None]
    right = torch.where(targets, p, 1 - p)
    weight = torch.where(targets, alpha, 1 - alpha)
    focal = (-weight * (1 - right) ** gamma * right.log()).flatten(1).mean(1)
    overlap, total = (p * targets).flatten(1).sum(1), p.flatten(1).sum(1) + targets.flatten(1).sum(1)
    return focal, 1 - (2 * overlap + smooth) / (total + smooth)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(sides, sides), st.tuples(sides, sides), st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.integers(1, 7), st.integers(0, 99), st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.sampled_from([0.5, 1.0, 10.0]), st.sampled_from([1, 40, 2**20]),
)  # fmt: skip
def test_values_and_gradients(
    grid: tuple[int, int], size: tuple[int, int], padding: tuple[int, int], count: int, seed: int, alpha: float,
    gamma: float, smooth: float, chunk: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    maps = 3 * torch.randn(count, *grid, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, 3, (2, *size), generator=generator).to(torch.uint8)
    masks[0, 0, 0] = 255
    pairs = torch.stack([torch.arange(count) % 2, torch.arange(count) // 2 % 3], dim=1)
    covers = (size[0] + padding[0], size[1] + padding[1])
    options = {"covers": covers, "alpha": alpha, "gamma": gamma, "smooth": smooth}
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "CHUNK", chunk)
        found, expected = focal_and_dice(ours, masks, pairs, **options), plain(theirs, masks, pairs, **options)
    factors = torch.arange(1, count + 1, dtype=torch.float64)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)
    for focal, dice in (found, expected):
        (focal @ factors + 0.7 * (dice @ factors)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_reach_no_further_than_asked() -> None:
    maps = torch.zeros(1, 2, 2)
    focal, dice = focal_and_dice(maps, torch.zeros(1, 4, 4, dtype=torch.uint8), torch.tensor([[0, 0]]), covers=(4, 4))
    assert not focal.requires_grad
    assert not dice.requires_grad
    assert focal.item() == pytest.approx(0.25 * 0.25 * 0.6931472)


def test_focal_of_certain_logits_is_finite() -> None:
    maps = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    masks = torch.tensor([[[1, 0]]], dtype=torch.int32)
    focal, dice = focal_and_dice(maps, masks, torch.tensor([[0, 0]]), covers=(1, 2))
    (focal + dice).sum().backward()
    assert focal.item() == pytest.approx((0.75 * 200 + 0.25 * 200) / 2)
    assert torch.isfinite(maps.grad).all()


def test_nothing_present() -> None:
    maps = torch.zeros(0, 4, 5, requires_grad=True)
    masks = torch.full((1, 8, 10), 255, dtype=torch.uint8)
    focal, dice = focal_and_dice(maps, masks, torch.zeros(0, 2, dtype=torch.int64), covers=(8, 10))
    assert focal.shape == dice.shape == (0,)
    (focal.sum() + dice.sum()).backward()
    assert maps.grad.shape == (0, 4, 5)


def test_what_is_kept_for_the_gradient_has_the_maps_size() -> None:
    kept: list[tuple[int, ...]] = []
    maps = torch.randn(5, 4, 4, requires_grad=True)
    pairs = torch.tensor([[0, k] for k in range(5)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        focal_and_dice(maps, torch.zeros(1, 64, 64, dtype=torch.uint8), pairs, covers=(64, 64))
    assert kept == [(2, 5, 4, 4)]
