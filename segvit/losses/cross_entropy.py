"""Pixel-wise cross entropy with ignored pixels, normalised by counts that the engine sums over the global batch.

Shapes    B images, K classes, h w logit grid, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.contracts import Dense


def pixel_counts(masks: Tensor, *, num_classes: int, ignore_index: int) -> dict[str, Tensor]:
    """Normalisers of pixel losses: `valid` pixels (at least 1) and all `pixels`."""
    valid = (masks != ignore_index).sum()
    return {"valid": valid, "pixels": torch.tensor(masks.numel(), device=masks.device)}


def logits_at(out: Dense, masks: Tensor) -> Tensor:
    """Logits resized to the labels' size over the covered area, in fp32: (B, K, H, W)."""
    height, width = masks.shape[-2:]
    logits = F.interpolate(out.logits.float(), size=out.covers, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def pixel_cross_entropy(logits: Tensor, masks: Tensor, *, total: Tensor, ignore_index: int) -> Tensor:
    """Sum of the cross entropy over valid pixels divided by `total` (at least 1)."""
    loss = F.cross_entropy(logits, masks.long(), ignore_index=ignore_index, reduction="sum")
    return loss / total.clamp(min=1)
