"""Focal and dice loss of binary masks from logits: one value of each a mask, so that callers choose the normalisation.

Both gradients are written out: plain autograd keeps some twenty tensors of mask size alive and passes over each of
them, which is most of the time and memory of a training step of a small network.

Shapes    P masks, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def focal_and_dice(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, smooth: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Focal loss (Lin et al., 2017), a mean over pixels, and dice loss of (P, H, W) logits and bool targets: (P,) each.

    Dice is 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth).
    """
    return _FocalAndDice.apply(logits, targets, alpha, gamma, smooth)


class _FocalAndDice(torch.autograd.Function):
    """With s the logit against the target, q = sigmoid(s) is how wrong a pixel is: 1 - p inside a mask, p outside."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, alpha: float, gamma: float, smooth: float
    ) -> tuple[Tensor, Tensor]:
        against = torch.where(targets, -logits, logits)
        wrong, entropy = against.sigmoid(), F.softplus(against)
        weight = torch.where(targets, logits.new_tensor(alpha), logits.new_tensor(1 - alpha))
        focal = (wrong.pow(gamma).mul_(entropy).mul_(weight)).mean(dim=(1, 2))
        inside = targets.sum(dim=(1, 2)).to(logits.dtype)
        missed = torch.where(targets, wrong, 0).sum(dim=(1, 2))  # sum of 1 - p inside
        overlap = inside - missed
        total = overlap + wrong.sum(dim=(1, 2)) - missed + inside + smooth  # sum(p) + sum(t) + smooth
        dice = 1 - (2 * overlap + smooth) / total
        ctx.save_for_backward(wrong, entropy, targets, overlap, total)
        ctx.options = (alpha, gamma, smooth)
        return focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_focal: Tensor, grad_dice: Tensor) -> tuple[Tensor, None, None, None, None]:
        wrong, entropy, targets, overlap, total = ctx.saved_tensors
        alpha, gamma, smooth = ctx.options
        right = 1 - wrong
        # d(q^g softplus(s)) / ds = q^g (g (1 - q) softplus(s) + q), and ds / dlogit is -1 inside, 1 outside.
        gradient = (gamma * entropy).mul_(right).add_(wrong).mul_(wrong.pow(gamma))
        scale = grad_focal / (targets.shape[1] * targets.shape[2])  # there may be no mask at all
        gradient.mul_(torch.where(targets, (-alpha * scale)[:, None, None], ((1 - alpha) * scale)[:, None, None]))
        # d dice / dp = ((2 overlap + smooth) / total - 2 t) / total, and dp / dlogit = q (1 - q).
        outside = (2 * overlap + smooth) / total**2 * grad_dice
        inside = outside - 2 / total * grad_dice
        slope = torch.where(targets, inside[:, None, None], outside[:, None, None])
        gradient.add_(slope.mul_(right).mul_(wrong))
        return gradient, None, None, None, None
