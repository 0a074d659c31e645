"""Crops of masked regions, all resized to one square, as an image classifier reads them.

Shapes    Q masks, V of them not empty, C channels, H W pixels, S side of a crop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are the first pixels outside


def region_crops(
    image: Tensor, masks: Tensor, *, side: int, fill: Tensor, threshold: float = 0.5, expand: float = 1.0,
    soft: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Crops (V, C, S, S) of an image (C, H, W), and which of the masks (Q, H, W) in 0..1 are not empty (Q,) bool.

    A mask is where its probability is above `threshold`. Its tight box grows by the factor `expand` about the centre,
    ends at the image's edge and is resized (bicubic, not antialiased, the ratio not kept). Pixels outside the mask
    become `fill` (C,); `soft` blends both by the probability instead.
    """
    inside = masks > threshold
    valid = inside.flatten(1).any(1)
    crops = []
    for index in valid.nonzero().flatten().tolist():
        left, top, right, bottom = grow(tight_box(inside[index]), expand, height=masks.shape[1], width=masks.shape[2])
        cut = slice(top, bottom), slice(left, right)
        share = (masks if soft else inside)[index][cut].to(image.dtype)
        crop = torch.lerp(fill.to(image)[:, None, None].expand(-1, *share.shape), image[:, cut[0], cut[1]], share)
        crops.append(F.interpolate(crop[None], size=(side, side), mode="bicubic", align_corners=False))
    return (torch.cat(crops) if crops else image.new_zeros(0, len(image), side, side)), valid


def tight_box(inside: Tensor) -> Box:
    """The smallest box around the true pixels (H, W), of which there is one at least."""
    columns, rows = inside.any(0).nonzero().flatten(), inside.any(1).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grow(box: Box, factor: float, *, height: int, width: int) -> Box:
    """The box times `factor` about its centre, cut to whole pixels towards zero and to the image."""
    low, high = torch.tensor(box, dtype=torch.float32).view(2, 2)  # a sum that ends at a whole pixel rounds as there
    centre, half = 0.5 * (low + high), 0.5 * ((high - low) * factor)
    left, top = (centre - half).int().clamp(min=0).tolist()
    right, bottom = torch.minimum((centre + half).int(), torch.tensor([width, height])).tolist()
    return left, top, right, bottom
