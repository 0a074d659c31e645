"""Cross entropy, focal loss and OHEM of pixels, normalised by counts that the engine sums over the global batch.

Ignored pixels count for nothing: they have no loss, no gradient and no part in any divisor. Class weights multiply the
loss of each pixel and not the divisor, so they should have mean 1 over the pixels (`segvit.data.balance` sees to it).

Shapes    B images, K classes, h w logit grid, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.contracts import Dense


def pixel_counts(masks: Tensor, *, num_classes: int, ignore_index: int) -> dict[str, Tensor]:
    """Normalisers of pixel losses: `valid` pixels, all `pixels`, and `images`."""
    sizes = {"pixels": masks.numel(), "images": len(masks)}
    return {
        "valid": (masks != ignore_index).sum(),
        **{name: torch.tensor(size, device=masks.device) for name, size in sizes.items()},
    }


def logits_at(out: Dense, masks: Tensor) -> Tensor:
    """Logits resized to the labels' size over the covered area, in fp32: (B, K, H, W)."""
    height, width = masks.shape[-2:]
    logits = F.interpolate(out.logits.float(), size=out.covers, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def pixel_cross_entropy(
    logits: Tensor, masks: Tensor, *, total: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """Sum of the cross entropy over valid pixels divided by `total` (at least 1)."""
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    loss = F.cross_entropy(logits, masks.long(), weight=weights, ignore_index=ignore_index, reduction="sum")
    return loss / total.clamp(min=1)


def pixel_focal(
    logits: Tensor, masks: Tensor, *, total: Tensor, ignore_index: int, gamma: float = 2.0,
    class_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Focal loss over the softmax (Lin et al., 2017, eq. 5): cross entropy times (1 - p)^gamma, summed like it.

    The class weights are the paper's alpha.
    """
    entropy = F.cross_entropy(logits, masks.long(), ignore_index=ignore_index, reduction="none")  # 0 where ignored
    # 1 - p without cancellation; the bound keeps the slope of a power below 1 finite at p = 1.
    wrong = -torch.expm1(-entropy).clamp(max=-torch.finfo(entropy.dtype).eps)
    loss = wrong.pow(gamma) * weighted(entropy, masks, class_weights)
    return loss.sum() / total.clamp(min=1)


def ohem_cross_entropy(
    logits: Tensor, masks: Tensor, *, total: Tensor, ignore_index: int, threshold: float = 0.7,
    min_kept: int = 100_000, class_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Online hard example mining (Shrivastava et al., 2016): the mean cross entropy of the hard pixels.

    Hard are pixels whose own class has a probability up to `threshold`, and in any case the `min_kept` hardest. They
    are chosen among these masks alone, so accumulation and several processes do not give one big batch's loss; each
    part counts by its share of the `total` valid pixels.
    """
    entropy = F.cross_entropy(logits, masks.long(), ignore_index=ignore_index, reduction="none")
    valid = masks != ignore_index
    with torch.no_grad():
        candidates = entropy[valid]
        hardest = candidates.topk(min(int(min_kept), len(candidates)), sorted=False).values
        limit = torch.cat([hardest, hardest.new_tensor([-math.log(threshold)])]).min()
        hard = valid & (entropy >= limit)
    loss = torch.where(hard, weighted(entropy, masks, class_weights), 0).sum() / hard.sum().clamp(min=1)
    return loss * len(candidates) / total.clamp(min=1)


def weighted(entropy: Tensor, masks: Tensor, class_weights: Tensor | None) -> Tensor:
    """The entropy (B, H, W) of each pixel times the weight of its class; it is 0 where a pixel is ignored."""
    if class_weights is None:
        return entropy
    labels = masks.long().clamp(max=len(class_weights) - 1)  # the ignore id has no weight
    return entropy * class_weights.to(entropy.dtype)[labels]
