"""The losses that a system with one logit a class and pixel can be trained with, and any sum of them.

Cross entropy and focal loss are sums over the valid pixels of the global batch divided by their number. Dice and Lovasz
are means over the classes present in an image, then over the images of the global batch. So all of these are the same
for one big batch, accumulation and several processes. OHEM is exempt: see `ohem_cross_entropy`.

Shapes    B images, K classes, H W pixels, P present (image, class) pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segvit.contracts import UserError
from segvit.losses.cross_entropy import ohem_cross_entropy, pixel_cross_entropy, pixel_focal
from segvit.losses.masks import binary_targets, present_classes
from segvit.losses.overlap import lovasz_softmax, soft_dice

BALANCED = ("cross_entropy", "focal", "ohem")  # the terms that class weights act on


def pixel_losses(
    logits: Tensor,
    masks: Tensor,
    totals: dict[str, Tensor],
    *,
    ignore_index: int,
    class_weights: Tensor | None = None,
    cross_entropy: float = 1.0,
    focal: float = 0.0,
    dice: float = 0.0,
    lovasz: float = 0.0,
    ohem: float = 0.0,
    gamma: float = 2.0,
    ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000,
) -> dict[str, Tensor]:
    """The weighted terms of logits (B, K, H, W) and integer masks (B, H, W); only those whose weight is not 0.

    `totals` are `pixel_counts` of the global batch. `class_weights` (K,), with mean 1 over the pixels, act on cross
    entropy, focal loss and OHEM; Dice and Lovasz give every class of an image the same weight already.
    """
    terms = {"cross_entropy": cross_entropy, "focal": focal, "ohem": ohem, "dice": dice, "lovasz": lovasz}
    check(terms, balanced=class_weights is not None)
    if not 0 < ohem_threshold <= 1 or ohem_min_kept < 0:
        raise UserError(
            f"loss: ohem_threshold {ohem_threshold} must be a probability above 0 and ohem_min_kept {ohem_min_kept} "
            "a number of pixels; correct them"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # losses never in half precision
    shared: Any = {"total": totals["valid"], "ignore_index": ignore_index, "class_weights": class_weights}
    losses: dict[str, Tensor] = {}
    if cross_entropy:
        losses["loss_ce"] = cross_entropy * pixel_cross_entropy(logits, masks, **shared)
    if focal:
        losses["loss_focal"] = focal * pixel_focal(logits, masks, gamma=gamma, **shared)
    if ohem:
        mined = ohem_cross_entropy(logits, masks, threshold=ohem_threshold, min_kept=ohem_min_kept, **shared)
        losses["loss_ohem"] = ohem * mined
    if dice or lovasz:
        probabilities, inside, shares = regions(logits, masks, ignore_index=ignore_index)
        shares = shares / totals["images"]
        if dice:
            losses["loss_dice"] = dice * (soft_dice(probabilities, inside) * shares).sum()
        if lovasz:
            losses["loss_lovasz"] = lovasz * (lovasz_softmax(probabilities, inside) * shares).sum()
    return losses


def check(terms: dict[str, float], *, balanced: bool) -> None:
    """Raises UserError for weights of terms that make no loss, or class weights that none of them uses."""
    negative = [name for name, weight in terms.items() if weight < 0]
    if negative:
        raise UserError(f"loss: {negative[0]} is {terms[negative[0]]}; a weight must not be negative")
    if not any(terms.values()):
        raise UserError(f"loss: all weights are 0; give one of {', '.join(terms)} a positive one")
    if balanced and not any(terms[name] for name in BALANCED):
        raise UserError(f"class_balance acts on {', '.join(BALANCED)}, none of which is used; set class_balance: none")


def regions(logits: Tensor, masks: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """What overlaps are made of, for each (image, class) pair that is present.

    The class's probabilities (P, H, W), 0 where ignored; where the class is (P, H, W) bool; and the pair's share of its
    image (P,): 1 / number of present classes.
    """
    present = present_classes(masks, num_classes=logits.shape[1], ignore_index=ignore_index)
    pairs = present.nonzero()  # (P, 2)
    places = pairs[:, 0] * logits.shape[1] + pairs[:, 1]
    probabilities = logits.softmax(1).flatten(0, 1).index_select(0, places)
    valid = (masks != ignore_index)[pairs[:, 0]]
    shares = 1 / present.sum(1)[pairs[:, 0]].to(logits.dtype)
    return torch.where(valid, probabilities, 0), binary_targets(masks, pairs), shares
