"""Focal and dice loss of present classes' masks, from low-resolution logits: one value of each a mask.

Masks are resized a few at a time, and their gradient is written out and brought back to low resolution at once. Plain
autograd keeps some twenty full-resolution tensors of all masks alive, which is most of the memory of the loss.

Shapes    B images, P present (image, class) pairs, h w map grid, H W pixels, C masks of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segvit.contracts import Size
from segvit.nn.readout import bilinear_matrix

# Pixels of a chunk, of which there are seven buffers. On a CPU they should stay near the cores, yet be large enough
# that threads which share their cores with loaders do not spend the time waiting for each other.
CHUNK, GPU_CHUNK = 2**20, 2**23


def focal_and_dice(
    maps: Tensor, masks: Tensor, pairs: Tensor, *, covers: Size, alpha: float = 0.25, gamma: float = 2.0,
    smooth: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Focal loss (Lin et al., 2017), a mean over pixels, and dice loss of each mask: (P,) and (P,).

    `maps` (P, h, w) are the logits of the (image, class) `pairs` (P, 2) of integer `masks` (B, H, W). They are resized
    (bilinear) to `covers` and cropped to the masks. Pixels of any other id are outside; the sums run over all pixels.
    Dice is 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth).
    """
    vertical = bilinear_matrix(maps.shape[-2], covers[0], device=maps.device, dtype=maps.dtype)[: masks.shape[-2]]
    horizontal = bilinear_matrix(maps.shape[-1], covers[1], device=maps.device, dtype=maps.dtype)[: masks.shape[-1]]
    return _FocalAndDice.apply(maps, masks, pairs.tolist(), (vertical, horizontal), (alpha, gamma, smooth))


class _FocalAndDice(torch.autograd.Function):
    """Both gradients are made in the forward pass, at the size of `maps`: they are linear in what comes from above."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, masks: Tensor, pairs: list[Sequence[int]], resize: tuple[Tensor, Tensor],
        options: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        height, width = masks.shape[-2:]
        pixels = GPU_CHUNK if maps.is_cuda else CHUNK
        count = min(len(maps), max(1, pixels // (height * width)))
        buffers = maps.new_empty(7, count, height, width)  # once: fresh pages cost more than the arithmetic on them
        focal, dice = maps.new_empty(len(maps)), maps.new_empty(len(maps))
        slopes = maps.new_empty(2, *maps.shape) if ctx.needs_input_grad[0] else None
        for first in range(0, len(maps), max(1, count)):
            chunk = slice(first, first + count)
            part = maps[chunk]
            scratch = buffers[:, : len(part)]
            for inside, (image, label) in zip(scratch[0], pairs[chunk], strict=True):
                torch.eq(masks[image], label, out=inside)
            total = _values(part, scratch, resize, options, (focal[chunk], dice[chunk]))
            if slopes is not None:
                _slopes(scratch, resize, options, total, slopes[:, chunk])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_focal: Tensor, grad_dice: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        gradient = slopes[0] * grad_focal[:, None, None] + slopes[1] * grad_dice[:, None, None]
        return gradient, None, None, None, None


def _values(
    part: Tensor, scratch: Tensor, resize: tuple[Tensor, Tensor], options: tuple[float, float, float],
    results: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the losses of a chunk (C, h, w) into `results`; returns the two sums that dice divides (C,).

    With s the logit against the target, q = sigmoid(s) is how wrong a pixel is: 1 - p inside a mask, p outside.
    """
    (vertical, horizontal), (alpha, gamma, smooth) = resize, options
    inside, against, wrong, entropy, power, product, _ = scratch  # (C, H, W) each; `inside` is 1 or 0
    torch.matmul(vertical, part @ horizontal.mT, out=against)
    against.addcmul_(against, inside, value=-2)
    torch.sigmoid(against, out=wrong)
    torch.logaddexp(against, against.new_zeros(()), out=entropy)  # softplus(s); its own function has no `out`
    torch.pow(wrong, gamma, out=power)
    torch.mul(power, entropy, out=product)
    everywhere = product.sum(dim=(1, 2))
    within = product.mul_(inside).sum(dim=(1, 2))
    results[0].copy_(((1 - alpha) * (everywhere - within) + alpha * within) / inside[0].numel())
    count = inside.sum(dim=(1, 2))
    missed = torch.mul(wrong, inside, out=product).sum(dim=(1, 2))  # sum of 1 - p inside
    overlap = 2 * (count - missed) + smooth
    total = wrong.sum(dim=(1, 2)) - 2 * missed + 2 * count + smooth  # sum(p) + sum(t) + smooth
    results[1].copy_(1 - overlap / total)
    return overlap, total


def _slopes(
    scratch: Tensor, resize: tuple[Tensor, Tensor], options: tuple[float, float, float],
    dice: tuple[Tensor, Tensor], results: Tensor,
) -> None:  # fmt: skip
    """Write the derivatives of the losses of a chunk by its low-resolution logits into `results` (2, C, h, w)."""
    (alpha, gamma, _), (overlap, total) = options, dice
    inside, _, wrong, entropy, power, right, signed = scratch
    torch.sub(1, wrong, out=right)
    # d(q^g softplus(s)) / ds = q^g (g (1 - q) softplus(s) + q), and ds / dlogit is -1 inside, 1 outside.
    entropy.mul_(right).mul_(gamma).add_(wrong).mul_(power)
    torch.sub(1 - alpha, inside, out=signed)  # 1 - alpha outside, -alpha inside
    results[0].copy_(_shrink(entropy.mul_(signed), resize)).div_(inside[0].numel())
    # d dice / dp = (overlap / total - 2 t) / total, and dp / dlogit = q (1 - q).
    steep = right.mul_(wrong)
    outside = (overlap / total**2)[:, None, None] * _shrink(steep, resize)
    torch.sub(outside, (2 / total)[:, None, None] * _shrink(steep.mul_(inside), resize), out=results[1])


def _shrink(field: Tensor, resize: tuple[Tensor, Tensor]) -> Tensor:
    """The transpose of the resize: (C, H, W) -> (C, h, w)."""
    vertical, horizontal = resize
    return vertical.mT @ (field @ horizontal)
