"""Class weights, focal loss and OHEM against their definitions, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.losses.cross_entropy import ohem_cross_entropy, pixel_counts, pixel_cross_entropy, pixel_focal

K = 4
WEIGHTS = torch.tensor([0.25, 0.5, 1.0, 3.0])


def batch(seed: int, *, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, K, size, size, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, K + 1, (2, size, size), generator=generator)
    return logits, torch.where(masks == K, 255, masks).to(torch.uint8)


def pixels(logits: Tensor, masks: Tensor) -> list[tuple[float, int]]:
    """The own class's probability and the class of every valid pixel."""
    flat = logits.softmax(1).movedim(1, -1).flatten(0, -2)
    return [(float(p[k]), k) for p, k in zip(flat, masks.flatten().tolist(), strict=True) if k != 255]


def total(masks: Tensor) -> Tensor:
    return pixel_counts(masks, num_classes=K, ignore_index=255)["valid"]


def test_counts_of_a_batch() -> None:
    masks = torch.tensor([[[0, 255]], [[1, 2]], [[255, 255]]])
    counts = pixel_counts(masks, num_classes=3, ignore_index=255)
    assert {name: int(value) for name, value in counts.items()} == {"valid": 3, "pixels": 6, "images": 3}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_weighted_cross_entropy(seed: int) -> None:
    logits, masks = batch(seed)
    loss = pixel_cross_entropy(logits, masks, total=total(masks), ignore_index=255, class_weights=WEIGHTS)
    plain = [-float(WEIGHTS[k]) * math.log(p) for p, k in pixels(logits, masks)]
    assert loss.item() == pytest.approx(sum(plain) / len(plain))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans())
def test_focal(seed: int, gamma: float, weighted: bool) -> None:
    logits, masks = batch(seed)
    loss = pixel_focal(
        logits, masks, total=total(masks), ignore_index=255, gamma=gamma, class_weights=WEIGHTS if weighted else None
    )
    plain = [-(WEIGHTS[k] if weighted else 1) * (1 - p) ** gamma * math.log(p) for p, k in pixels(logits, masks)]
    assert loss.item() == pytest.approx(float(sum(plain)) / len(plain))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_of_focal(gamma: float) -> None:
    logits, masks = batch(0, size=2)
    masks[0, 0, 0] = 255
    options = {"total": total(masks), "ignore_index": 255, "gamma": gamma, "class_weights": WEIGHTS}
    assert torch.autograd.gradcheck(lambda x: pixel_focal(x, masks, **options), logits.requires_grad_())


def test_focal_of_certain_pixels_is_finite() -> None:
    logits = torch.tensor([[[[300.0, -300.0]], [[-300.0, 300.0]]]], requires_grad=True)
    for labels in ([[[0, 1]]], [[[1, 0]]]):
        loss = pixel_focal(logits, torch.tensor(labels), total=torch.tensor(2), ignore_index=255, gamma=0.5)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(gradient).all()
        assert loss.item() == pytest.approx(600 if labels == [[[1, 0]]] else 0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.1, 0.3, 0.7, 1.0]), st.integers(0, 60), st.booleans())
def test_ohem(seed: int, threshold: float, min_kept: int, weighted: bool) -> None:
    """Sorted by probability: pixels up to the threshold, and at least the `min_kept` first."""
    logits, masks = batch(seed)
    loss = ohem_cross_entropy(
        logits, masks, total=2 * total(masks), ignore_index=255, threshold=threshold, min_kept=min_kept,
        class_weights=WEIGHTS if weighted else None,
    )  # fmt: skip
    ordered = sorted(pixels(logits, masks))
    hard = [(p, k) for rank, (p, k) in enumerate(ordered) if p <= threshold or rank < min_kept]
    plain = [-float(WEIGHTS[k] if weighted else 1) * math.log(p) for p, k in hard]
    assert loss.item() == pytest.approx(sum(plain) / max(1, len(plain)) / 2)


def test_ohem_of_all_pixels_is_cross_entropy() -> None:
    logits, masks = batch(3)
    plain = F.cross_entropy(logits, masks.long(), ignore_index=255)
    for options in ({"threshold": 1.0, "min_kept": 0}, {"threshold": 0.01, "min_kept": 10**6}):
        torch.testing.assert_close(
            ohem_cross_entropy(logits, masks, total=total(masks), ignore_index=255, **options), plain
        )


def test_easy_pixels_get_no_gradient_from_ohem() -> None:
    logits = torch.tensor([5.0, 0.0, -5.0]).repeat(2, 1)[None, :, None] * torch.tensor([1.0, -1.0])[:, None, None]
    logits.requires_grad_()
    masks = torch.zeros(1, 1, 3, dtype=torch.uint8)
    ohem_cross_entropy(logits, masks, total=torch.tensor(3), ignore_index=255, min_kept=1).backward()
    assert logits.grad[0, 0, 0].ne(0).tolist() == [False, True, True]
