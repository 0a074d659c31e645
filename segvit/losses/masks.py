"""What mask losses and their normalisers look up in integer label maps.

Shapes    B images, K classes, H W pixels, P present (image, class) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def present_classes(masks: Tensor, *, num_classes: int, ignore_index: int) -> Tensor:
    """Which classes occur in which image: (B, K) bool for integer masks (B, H, W).

    Raises ValueError for an id that is neither a class nor the ignore id.
    """
    flat = masks.flatten(1).long()
    offset = torch.arange(len(flat), device=flat.device)[:, None] * (ignore_index + 1)
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high > ignore_index:
        wrong = low if low < 0 else high
        raise ValueError(f"mask id {wrong} is neither a class (0..{num_classes - 1}) nor {ignore_index}")
    counts = torch.bincount((flat + offset).flatten(), minlength=len(flat) * (ignore_index + 1))
    counts = counts.view(len(flat), ignore_index + 1)
    stray = counts[:, num_classes:ignore_index].sum(0).nonzero()
    if len(stray):
        raise ValueError(
            f"mask id {int(stray[0]) + num_classes} is neither a class (0..{num_classes - 1}) nor {ignore_index}"
        )
    return counts[:, :num_classes] > 0


def binary_targets(masks: Tensor, pairs: Tensor) -> Tensor:
    """One binary mask for each (image, class) pair (P, 2): (P, H, W) bool. Ignored pixels are negatives everywhere."""
    return masks[pairs[:, 0]] == pairs[:, 1, None, None].to(masks.dtype)
