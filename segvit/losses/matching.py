"""Set prediction: queries are matched one to one to masks, then learn the class and the mask that they got.

Source    DETR's bipartite matching with MaskFormer's terms (Cheng et al., NeurIPS 2021, arXiv 2107.06278).
Checked   tests/golden/zsseg__set_criterion (MendelXu/zsseg.baseline criterion.py, matcher.py).

Shapes    B images, Q queries, K classes, P target masks, h w map grid, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from segvit.contracts import Size
from segvit.losses.binary import focal_and_dice

Match = tuple[Tensor, Tensor]  # queries and the targets that they got, of one image


class Targets(NamedTuple):
    """P binary masks, each the pixels of one id in one of M label maps; the masks of one image may overlap."""

    maps: Tensor  # (M, H, W) integer
    pairs: Tensor  # (P, 2) the map and the id in it
    images: Tensor  # (P,) of the batch, ascending
    labels: Tensor  # (P,) class ids


class Terms(NamedTuple):
    """What the class, the focal and the Dice term count."""

    cls: float = 1.0
    mask: float = 20.0
    dice: float = 1.0


def class_targets(masks: Tensor, present: Tensor) -> Targets:
    """One mask for each class that is `present` (B, K) in an image of integer masks (B, H, W)."""
    pairs = present.nonzero()
    return Targets(masks, pairs, pairs[:, 0], pairs[:, 1])


def set_losses(
    class_logits: Tensor, maps: Tensor, targets: Targets, matches: list[Match], totals: dict[str, Tensor], *,
    covers: Size, weights: Terms = Terms(), no_object: float = 0.1, alpha: float = 0.25, gamma: float = 2.0,
) -> dict[str, Tensor]:  # fmt: skip
    """The weighted terms `ce`, `mask` and `dice` of one decoder layer whose `matches` are given.

    `class_logits` (B, Q, K + 1) end with "no object"; `maps` (B, Q, h, w) are mask logits over the area `covers`.
    `totals` of the global batch are its `images` and the number of its target masks, `present`, which focal and Dice
    loss are divided by. The cross entropy is a mean over all queries in which an unmatched one counts `no_object`.
    """
    count, slots = totals["present"].to(maps.dtype), totals["images"] * maps.shape[1]
    image, query, target = located(matches, targets)
    labels = torch.full(class_logits.shape[:2], class_logits.shape[2] - 1, device=maps.device)
    labels[image, query] = targets.labels[target]
    balance = class_logits.new_ones(class_logits.shape[2])
    balance[-1] = no_object
    entropy = F.cross_entropy(class_logits.mT, labels, weight=balance, reduction="none").sum()
    matched = count.clamp(max=slots)
    focal, dice = focal_and_dice(
        maps[image, query], targets.maps, targets.pairs[target], covers=covers, alpha=alpha, gamma=gamma
    )
    return {
        "ce": weights.cls * entropy / (matched + no_object * (slots - matched)),
        "mask": weights.mask * focal.sum() / count.clamp(min=1),
        "dice": weights.dice * dice.sum() / count.clamp(min=1),
    }


def located(matches: list[Match], targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The matches of a batch as places: image, query and the number among all targets, one value a match."""
    first = torch.bincount(targets.images, minlength=len(matches)).cumsum(0).roll(1)
    first[0] = 0
    images = torch.cat([torch.full_like(query, image) for image, (query, _) in enumerate(matches)])
    queries, numbers = (torch.cat(part) for part in zip(*matches, strict=True))
    return images, queries, numbers + first[images]


@torch.no_grad()
def match(
    class_logits: Tensor, maps: Tensor, targets: Targets, *, covers: Size, costs: Terms = Terms(), alpha: float = 0.25,
    gamma: float = 2.0,
) -> list[Match]:  # fmt: skip
    """The cheapest one-to-one pairs of queries and targets in each image, in the order of the queries.

    A pair costs minus the probability of the target's class, the focal and the Dice loss of its mask, shrunk to the
    grid of the maps by taking the nearest pixel; shapes as in `set_losses`.
    """
    below, right = (covers[axis] - targets.maps.shape[axis + 1] for axis in (0, 1))
    padded = F.pad(targets.maps.float(), (0, right, 0, below), value=-1.0)
    small = F.interpolate(padded[:, None], size=maps.shape[-2:], mode="nearest")[:, 0]
    matches = []
    for image in range(len(maps)):
        own = targets.images == image
        pairs = targets.pairs[own]
        inside = (small[pairs[:, 0]] == pairs[:, 1, None, None]).flatten(1).to(maps.dtype)  # (P, h*w)
        chances = class_logits[image].softmax(-1)[:, targets.labels[own]]
        focal, dice = pair_costs(maps[image].flatten(1), inside, alpha=alpha, gamma=gamma)
        cost = costs.mask * focal + costs.dice * dice - costs.cls * chances  # (Q, P)
        # A network that has diverged is found by its loss; the solver would only say that the matrix is wrong.
        rows, columns = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
        matches.append((torch.from_numpy(rows).to(maps.device), torch.from_numpy(columns).to(maps.device)))
    return matches


def pair_costs(logits: Tensor, inside: Tensor, *, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss (Q, P) of every query's logits (Q, N) against every binary mask (P, N)."""
    chance = logits.sigmoid()
    hit = alpha * (1 - chance) ** gamma * F.softplus(-logits)
    miss = (1 - alpha) * chance**gamma * F.softplus(logits)
    focal = (hit @ inside.mT + miss @ (1 - inside).mT) / logits.shape[1]
    total = chance.sum(1)[:, None] + inside.sum(1)
    return focal, 1 - (2 * chance @ inside.mT + 1) / (total + 1)
