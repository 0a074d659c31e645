"""The structure loss of binary medical segmentation: cross entropy and IoU that look harder near outlines.

Source    F3Net (Wei et al., AAAI 2020, arXiv 1911.11445, eq. 11 to 15), as PraNet, Polyp-PVT and DuAT train with it.
Weights   w = 1 + weight * |mean of the mask in a square window - mask|: high where the window holds an outline. What
          lies outside the image counts as background in the mean, and so do ignored pixels.
Readings  `per_pixel` is the paper's formula, cross entropy averaged with w in each image. `released` is what the
          published code computes: there a string meets an argument that takes a truth value, so the entropy comes out
          as one mean over the batch and w cancels. The IoU term is weighted in both.

Shapes    B images, O sigmoid outputs, H W pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.contracts import UserError

Reading = Literal["released", "per_pixel"]


class Structure(NamedTuple):
    """The two terms, not weighted; 0 for an image whose pixels are all ignored."""

    bce: Tensor
    iou: Tensor


def outline_weights(inside: Tensor, *, window: int = 31, weight: float = 5.0) -> Tensor:
    """w of masks (B, O, H, W) in 0..1. Raises UserError for a window that has no middle."""
    if window < 1 or window % 2 == 0:
        raise UserError(f"loss: window is {window}; give an odd number of pixels, such as 31")
    mean = F.avg_pool2d(inside, window, stride=1, padding=window // 2)
    return 1 + weight * (mean - inside).abs()


def structure_loss(
    logits: Tensor, inside: Tensor, valid: Tensor, totals: dict[str, Tensor], *, reading: Reading = "released",
    window: int = 31, weight: float = 5.0, smooth: float = 1.0,
) -> Structure:  # fmt: skip
    """Both terms of logits (B, O, H, W), as means over the outputs and over the images of the global batch.

    `inside` are the masks in 0..1, `valid` (B, 1, H, W) is False where a pixel is ignored, and `totals` hold the global
    numbers of `valid` pixels and of `images`. IoU is 1 - (sum(w p m) + smooth) / (sum(w (p + m - p m)) + smooth).
    """
    if reading not in get_args(Reading):
        raise UserError(f"loss: reading is {reading!r}; choose from {', '.join(get_args(Reading))}")
    outputs = logits.shape[1]
    regions = outputs * totals["images"]
    inside = torch.where(valid, inside, 0)
    weights = torch.where(valid, outline_weights(inside, window=window, weight=weight), 0)
    entropy = F.binary_cross_entropy_with_logits(logits, inside, reduction="none")
    if reading == "released":
        bce = torch.where(valid, entropy, 0).sum() / (outputs * totals["valid"]).clamp(min=1)
    else:
        total = weights.sum(dim=(2, 3)).clamp(min=1)  # of ignored pixels alone it is 0, of others at least 1
        bce = ((weights * entropy).sum(dim=(2, 3)) / total).sum() / regions
    probabilities = logits.sigmoid()
    overlap = (weights * probabilities * inside).sum(dim=(2, 3))  # (B, O)
    union = (weights * (probabilities + inside)).sum(dim=(2, 3)) - overlap
    return Structure(bce, (1 - (overlap + smooth) / (union + smooth)).sum() / regions)
