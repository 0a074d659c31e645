"""Dice and Lovasz-softmax against their definitions, of which the Lovasz extension is spelled out set by set."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.losses.overlap import jaccard_slopes, lovasz_softmax, soft_dice


def regions(seed: int, *, count: int = 3, height: int = 3, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(count, height, width, generator=generator) < 0.4
    inside[:, 0, 0] = True  # no region is empty
    return torch.rand(count, height, width, generator=generator, dtype=torch.float64), inside


def jaccard_loss(wrong: set[int], region: set[int]) -> float:
    """1 - IoU of the region and what a prediction that is wrong at these pixels takes for it."""
    predicted = region ^ wrong
    return 1 - len(predicted & region) / len(predicted | region)


def extension(errors: list[float], region: set[int]) -> float:
    """The Lovasz extension of the Jaccard loss: each error times what its pixel adds, from the largest error down."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    sets = [set(order[:n]) for n in range(len(order) + 1)]
    added = [jaccard_loss(now, region) - jaccard_loss(before, region) for before, now in pairwise(sets)]
    return sum(errors[i] * step for i, step in zip(order, added, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999))
def test_lovasz_softmax(seed: int) -> None:
    probabilities, inside = regions(seed)
    found = lovasz_softmax(probabilities, inside).tolist()
    for value, p, region in zip(found, probabilities.flatten(1), inside.flatten(1), strict=True):
        errors = torch.where(region, 1 - p, p).tolist()
        assert value == pytest.approx(extension(errors, set(region.nonzero()[:, 0].tolist())))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999))
def test_of_hard_predictions_they_are_jaccard_and_dice(seed: int) -> None:
    probabilities, inside = regions(seed)
    guess = probabilities > 0.5
    shared, either = (guess & inside).sum(dim=(1, 2)), (guess | inside).sum(dim=(1, 2))
    torch.testing.assert_close(lovasz_softmax(guess.double(), inside), 1 - shared.double() / either)
    torch.testing.assert_close(soft_dice(guess.double(), inside), 1 - 2 * shared.double() / (shared + either))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999))
def test_soft_dice(seed: int) -> None:
    probabilities, inside = regions(seed)
    for value, p, t in zip(soft_dice(probabilities, inside), probabilities, inside.double(), strict=True):
        torch.testing.assert_close(value, 1 - 2 * (p * t).sum() / (p.sum() + t.sum()))


@pytest.mark.parametrize("loss", [soft_dice, lovasz_softmax])
def test_gradients(loss) -> None:
    probabilities, inside = regions(1)
    assert torch.autograd.gradcheck(lambda p: loss(p, inside), probabilities.requires_grad_())


@pytest.mark.parametrize("loss", [soft_dice, lovasz_softmax])
def test_no_region(loss) -> None:
    probabilities = torch.zeros(0, 3, 4, requires_grad=True)
    value = loss(probabilities, torch.zeros(0, 3, 4, dtype=torch.bool))
    assert value.shape == (0,)
    value.sum().backward()
    assert probabilities.grad.shape == (0, 3, 4)


def test_slopes_of_a_large_region_keep_their_digits(seeded: torch.Generator) -> None:
    """The slopes of all pixels add up to the loss of being wrong everywhere: 1."""
    errors = torch.rand(1_000_000, generator=seeded)
    inside = torch.rand(1_000_000, generator=seeded) < 0.01
    slopes, exact = jaccard_slopes(errors, inside), jaccard_slopes(errors.double(), inside)
    assert exact.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(slopes.double(), exact, rtol=1e-6, atol=0)
