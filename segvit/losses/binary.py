"""Losses of binary masks from logits: one value a mask, so that callers choose the normalisation.

Shapes    P masks, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., 2017) of (P, H, W) logits and 0/1 targets, averaged over pixels: (P,)."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = probability + targets - 2 * probability * targets  # 1 - p_t
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (weight * entropy * wrong**gamma).mean(dim=(1, 2))


def sigmoid_dice(logits: Tensor, targets: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Dice loss of (P, H, W) logits and 0/1 targets, `smooth` in numerator and denominator: (P,)."""
    probability = logits.sigmoid().flatten(1)
    targets = targets.flatten(1)
    overlap = (probability * targets).sum(1)
    return 1 - (2 * overlap + smooth) / (probability.sum(1) + targets.sum(1) + smooth)
