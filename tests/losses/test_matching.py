"""Matching and set losses: the cheapest pairs, their costs, images without targets, padding."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from segvit.losses.binary import focal_and_dice
from segvit.losses.masks import present_classes
from segvit.losses.matching import Terms, class_targets, match, pair_costs, set_losses


def targets_of(masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    present = present_classes(masks, num_classes=3, ignore_index=255)
    return present, {"images": torch.tensor(len(masks)), "present": present.sum()}


def test_costs_are_the_losses_of_each_pair() -> None:
    torch.manual_seed(0)
    masks, logits = torch.randint(0, 3, (1, 6, 5)), torch.randn(4, 6, 5)
    inside = torch.stack([masks[0] == label for label in range(3)]).flatten(1).float()
    focal, dice = pair_costs(logits.flatten(1), inside, alpha=0.3, gamma=1.5)
    for query, label in itertools.product(range(4), range(3)):
        pair = torch.tensor([[0, label]])
        expected = focal_and_dice(logits[query][None], masks, pair, covers=(6, 5), alpha=0.3, gamma=1.5)
        torch.testing.assert_close(torch.stack([focal[query, label], dice[query, label]]), torch.cat(expected))


def test_queries_that_know_their_masks_get_them() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, :, 4:], masks[1] = 2, 255
    present, totals = targets_of(masks)
    maps = torch.full((2, 3, 8, 8), -9.0)
    maps[0, 0, :, 4:] = 9
    maps[0, 2, :, :4] = 9
    logits = torch.zeros(2, 3, 4)
    logits[..., 3] = 20
    logits[0, 0], logits[0, 2] = torch.tensor([0.0, 0, 20, 0]), torch.tensor([20.0, 0, 0, 0])
    targets = class_targets(masks, present)
    matches = match(logits, maps, targets, covers=(8, 8))
    assert [[part.tolist() for part in pair] for pair in matches] == [[[0, 2], [1, 0]], [[], []]]
    losses = set_losses(logits, maps, targets, matches, totals, covers=(8, 8))
    assert all(value < 1e-2 for value in losses.values())


def test_weights_scale_terms_and_padding_is_outside() -> None:
    torch.manual_seed(1)
    masks = torch.randint(0, 3, (2, 7, 6), dtype=torch.uint8)
    present, totals = targets_of(masks)
    logits, maps, targets = torch.randn(2, 5, 4), torch.randn(2, 5, 4, 4), class_targets(masks, present)
    matches = match(logits, maps, targets, covers=(8, 8))
    plain = set_losses(logits, maps, targets, matches, totals, covers=(8, 8), weights=Terms(1, 1, 1))
    scaled = set_losses(logits, maps, targets, matches, totals, covers=(8, 8), weights=Terms(2, 3, 4))
    for name, factor in (("ce", 2), ("mask", 3), ("dice", 4)):
        torch.testing.assert_close(scaled[name], factor * plain[name])


def test_a_diverged_network_does_not_stop_the_matching() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    present, _ = targets_of(masks)
    queries, _ = match(
        torch.full((1, 2, 4), torch.nan), torch.randn(1, 2, 4, 4), class_targets(masks, present), covers=(4, 4)
    )[0]
    assert len(queries) == 1
