"""The losses against their formulas, and what they look up in label maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.contracts import Dense
from segvit.losses.binary import focal_and_dice
from segvit.losses.cross_entropy import logits_at, pixel_counts, pixel_cross_entropy
from segvit.losses.masks import binary_targets, present_classes

sizes = st.integers(1, 9)


def pair(count: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, height, width, generator=generator, dtype=torch.float64)
    return logits, torch.rand(count, height, width, generator=generator) < 0.4


@settings(max_examples=40, deadline=None)
@given(
    sizes, sizes, sizes, st.integers(0, 99), st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.sampled_from([0.5, 1.0, 10.0]),
)  # fmt: skip
def test_focal_and_dice(
    count: int, height: int, width: int, seed: int, alpha: float, gamma: float, smooth: float
) -> None:
    """Values and gradients against the formulas through plain autograd."""
    logits, targets = pair(count, height, width, seed)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    focal, dice = focal_and_dice(ours, targets, alpha=alpha, gamma=gamma, smooth=smooth)
    p = plain.sigmoid()
    right = torch.where(targets, p, 1 - p)
    weight = torch.where(targets, alpha, 1 - alpha)
    focal_too = (-weight * (1 - right) ** gamma * right.log()).flatten(1).mean(1)
    overlap, total = (p * targets).flatten(1).sum(1), p.flatten(1).sum(1) + targets.flatten(1).sum(1)
    dice_too = 1 - (2 * overlap + smooth) / (total + smooth)
    torch.testing.assert_close(focal, focal_too)
    torch.testing.assert_close(dice, dice_too)
    factors = torch.arange(1, count + 1, dtype=torch.float64)
    (focal @ factors + 0.7 * (dice @ factors)).backward()
    (focal_too @ factors + 0.7 * (dice_too @ factors)).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_focal_of_certain_logits_is_finite() -> None:
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    focal, dice = focal_and_dice(logits, torch.tensor([[[False, True]]]))
    (focal + dice).sum().backward()
    assert focal.item() == pytest.approx((0.75 * 200 + 0.25 * 200) / 2)
    assert torch.isfinite(logits.grad).all()


def test_mask_losses_of_nothing() -> None:
    logits = torch.zeros(0, 4, 5, requires_grad=True)
    focal, dice = focal_and_dice(logits, torch.zeros(0, 4, 5, dtype=torch.bool))
    assert focal.shape == dice.shape == (0,)
    (focal.sum() + dice.sum()).backward()
    assert logits.grad.shape == (0, 4, 5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99), st.sampled_from([255, 65535]))
def test_present_classes(images: int, classes: int, seed: int, ignore: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, classes + 1, (images, 3, 4), generator=generator, dtype=torch.int32)
    masks[masks == classes] = ignore
    present = present_classes(masks, num_classes=classes, ignore_index=ignore)
    expected = [[bool((mask == k).any()) for k in range(classes)] for mask in masks]
    assert present.tolist() == expected


def test_present_classes_up_to_the_ignore_id() -> None:
    masks = torch.tensor([[[0, 254, 255]]], dtype=torch.uint8)
    present = present_classes(masks, num_classes=255, ignore_index=255)
    assert present.nonzero().tolist() == [[0, 0], [0, 254]]


@pytest.mark.parametrize(("wrong", "ignore"), [(3, 255), (254, 255), (256, 255), (-1, 255), (300, 65535)])
def test_ids_that_are_no_class(wrong: int, ignore: int) -> None:
    masks = torch.zeros(2, 3, 3, dtype=torch.int32)
    masks[1, 1, 1] = wrong
    with pytest.raises(ValueError, match=rf"mask id {wrong} is neither a class \(0\.\.2\) nor {ignore}"):
        present_classes(masks, num_classes=3, ignore_index=ignore)


def test_binary_targets() -> None:
    masks = torch.tensor([[[0, 2, 255]], [[1, 1, 0]]], dtype=torch.uint8)
    pairs = present_classes(masks, num_classes=3, ignore_index=255).nonzero()
    assert pairs.tolist() == [[0, 0], [0, 2], [1, 0], [1, 1]]
    targets = binary_targets(masks, pairs)
    assert targets.dtype == torch.bool
    assert targets[:, 0].tolist() == [
        [True, False, False], [False, True, False], [False, False, True], [True, True, False]
    ]  # fmt: skip


def test_cross_entropy_is_divided_by_the_given_total(seeded: torch.Generator) -> None:
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    masks[0, 0], masks[1, :, 2:] = 255, 255
    totals = pixel_counts(masks, num_classes=3, ignore_index=255)
    assert (int(totals["valid"]), int(totals["pixels"])) == (15 + 8, 40)
    loss = pixel_cross_entropy(logits, masks.to(torch.uint8), total=totals["valid"], ignore_index=255)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks, ignore_index=255))
    doubled = pixel_cross_entropy(logits, masks, total=2 * totals["valid"], ignore_index=255)
    torch.testing.assert_close(doubled, loss / 2)


def test_cross_entropy_of_ignored_pixels_is_zero() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    masks = torch.full((1, 2, 2), 255)
    loss = pixel_cross_entropy(logits, masks, total=torch.tensor(0), ignore_index=255)
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_logits_at_interpolates_the_covered_area_and_crops(seeded: torch.Generator) -> None:
    out = Dense(torch.randn(1, 3, 3, 4, dtype=torch.bfloat16), {}, (24, 32))
    logits = logits_at(out, torch.zeros(1, 20, 25))
    full = F.interpolate(out.logits.float(), size=(24, 32), mode="bilinear", align_corners=False)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, full[..., :20, :25])
