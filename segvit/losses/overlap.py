"""Soft Dice and Lovasz-softmax: how well the probabilities of a class overlap its region. One value a region.

A region is one class in one image. Ignored pixels come in with probability 0 and outside of every region, which is the
same as leaving them out.

Shapes    P present (image, class) pairs, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_dice(probabilities: Tensor, inside: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum(p) + sum(t)) of probabilities and bool regions (P, H, W), none of them empty: (P,)."""
    overlap = torch.where(inside, probabilities, 0).sum(dim=(1, 2))
    return 1 - 2 * overlap / (probabilities.sum(dim=(1, 2)) + inside.sum(dim=(1, 2)))


def lovasz_softmax(probabilities: Tensor, inside: Tensor) -> Tensor:
    """The convex extension of the Jaccard loss (Berman et al., 2018, arXiv 1705.08790); shapes as in `soft_dice`.

    For a fixed order of the errors it is linear in them, so the slopes are constants for the gradient.
    """
    errors = torch.where(inside, 1 - probabilities, probabilities)  # (P, H, W)
    slopes = torch.empty_like(errors)
    for row, error, region in zip(slopes, errors.detach(), inside, strict=True):  # one sort at a time, for memory
        row.copy_(jaccard_slopes(error.flatten(), region.flatten()).view_as(row))
    return (errors * slopes).sum(dim=(1, 2))


def jaccard_slopes(errors: Tensor, inside: Tensor) -> Tensor:
    """By how much each pixel raises the Jaccard loss when pixels turn wrong from the largest error down: (N,).

    The difference of neighbouring losses is written out, because subtracting them would cancel most digits.
    """
    order = errors.argsort(descending=True)
    hit = inside[order]
    left = hit.sum() - hit.cumsum(0, dtype=torch.int32)  # pixels of the region still right, after each step
    union = (inside.sum() + (~hit).cumsum(0, dtype=torch.int32)).to(errors.dtype)
    # A missed pixel shrinks the intersection by 1; a false one grows the union from union - 1.
    steps = torch.where(hit, 1 / union, left / (union * (union - 1)).clamp(min=1))
    return torch.empty_like(errors).scatter_(0, order, steps)
