"""Class scores for a band of pixel rows, so that a full-resolution tensor of all classes never exists.

Shapes    B images, K classes, Q queries, h w map grid, H W pixels, R rows of a band.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.contracts import Dense, Size


def bilinear_rows(maps: Tensor, size: Size, rows: range) -> Tensor:
    """Rows of the bilinear resize (align_corners=False, no antialias) of (B, C, h, w) to `size`: (B, C, R, W).

    The rows equal those of a full resize up to rounding, whatever the band: rows are blended first, on the small map,
    then columns by the library's kernel.
    """
    height, width = maps.shape[-2:]
    if height != size[0]:
        place = (torch.arange(rows.start, rows.stop, device=maps.device, dtype=torch.float64) + 0.5) * (height / size[0])
        place = (place - 0.5).clamp_(min=0)
        above = place.long().clamp_(max=height - 1)
        below = (above + 1).clamp_(max=height - 1)
        blend = (place - above).to(maps.dtype)[:, None]  # (R, 1)
        maps = maps[:, :, above] * (1 - blend) + maps[:, :, below] * blend  # (B, C, R, w)
    else:
        maps = maps[:, :, rows.start : rows.stop]
    if width != size[1]:
        maps = F.interpolate(maps, size=(len(rows), size[1]), mode="bilinear", align_corners=False)
    return maps


def logit_rows(out: Dense, size: Size, rows: range) -> Tensor:
    """The default readout: logits resized over the area that they cover, cropped to the input (B, K, R, W)."""
    return bilinear_rows(out.logits, out.covers, rows)[..., : size[1]]


def mix_masks(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Semantic inference of mask classification: (B, Q, K) class probabilities, (B, Q, h, w) mask probabilities.

    Returns (B, K, h, w): for every class the sum over queries of probability times mask.
    """
    return torch.bmm(probabilities.mT, masks.flatten(2)).unflatten(2, masks.shape[-2:])
