"""What a critic of segmentations sees and what keeps its slope at 1.

Shapes    B images of C channels, K classes, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

ClassAware = Literal["foreground", "per_class"]


def class_aware(images: Tensor, probabilities: Tensor, valid: Tensor, *, mode: ClassAware = "foreground") -> Tensor:
    """What the critic sees: images (B, C, H, W) times class probabilities (B, K, H, W), 0 where not `valid` (B, H, W).

    `foreground` multiplies by 1 - p of class 0, the background: (B, C, H, W). `per_class` gives one image for each
    class: (B * K, C, H, W).
    """
    kept = valid[:, None].to(images.dtype)
    if mode == "foreground":
        return images * (1 - probabilities[:, :1]) * kept
    return ((images * kept)[:, None] * probabilities[:, :, None]).flatten(0, 1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al., 2017, arXiv 1704.00028): mean of (|gradient| - 1)^2 at random points between pairs."""
    share = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # The norm of an exact 0, as under an empty mask, would have no slope itself.
    return (((slope.square().flatten(1).sum(1) + 1e-12).sqrt() - 1) ** 2).mean()


def one_hot(masks: Tensor, count: int, *, ignore_index: int) -> Tensor:
    """(B, K, H, W) bool, False for all classes where ignored."""
    labels = masks.long()[:, None]
    return (labels == torch.arange(count, device=masks.device)[:, None, None]) & (labels != ignore_index)
