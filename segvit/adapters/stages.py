"""Stages of a backbone, for adapters that act between them, and blocks that take the place of others.

A plain ViT has four groups of equally many blocks, fewer where it has fewer blocks; a pyramid has the stages whose maps
it returns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import FeatureListNet
from torch import Tensor, nn

from segvit.backbones.clip import ClipResNet
from segvit.backbones.pvt import PVT
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, UserError

GROUPS = 4


def gaps_behind_stages(backbone: nn.Module) -> list[tuple[str, int]]:
    """The gap behind each stage, such as `gaps.3`, and its number of channels.

    Raises UserError for a backbone without gaps.
    """
    if isinstance(backbone, PlainViT):
        return [(f"gaps.{end}", backbone.dim) for end in group_ends(backbone)]
    listed = isinstance(backbone, Pyramid) and isinstance(backbone.network, FeatureListNet)
    if isinstance(backbone, PVT | ClipResNet) or (isinstance(backbone, Pyramid) and listed):
        return [(f"gaps.{stage}", dim) for stage, dim in enumerate(backbone.dims, start=1)]
    raise UserError(
        f"this {type(backbone).__name__} has no gaps between its stages; use a plain ViT, PVT, or a pyramid such as "
        "ResNet, Swin, ConvNeXt, or another adapter such as ssf"
    )


def group_ends(vit: PlainViT) -> list[int]:
    """Where the groups of the blocks that run end; earlier groups get the blocks that are left over."""
    blocks = vit.out_indices[-1] + 1
    groups = min(GROUPS, blocks)
    return [-(-blocks * group // groups) for group in range(1, groups + 1)]


def borrow(shell: nn.Module, block: nn.Module) -> None:
    """Let a new module hold the parts of another under their own names, so that the keys stay."""
    for name, child in block.named_children():
        shell.add_module(name, child)
    # The very dicts: what moves one to another device moves the other.
    shell._parameters, shell._buffers = block._parameters, block._buffers


def stage_entropy(out: Dense, masks: Tensor, valid: Tensor, *, prefix: str, ignore_index: int) -> Tensor:
    """Cross entropy at the masks' size of the stages' class maps, the extras named `prefix` and a number: their mean.

    `valid` is the number of pixels that are not ignored in the global batch.
    """
    maps = [value for name, value in out.extras.items() if name.startswith(prefix)]
    total, (height, width) = masks.new_zeros((), dtype=torch.float32), masks.shape[-2:]
    for scores in maps:
        resized = F.interpolate(scores.float(), size=out.covers, mode="bilinear", align_corners=False)
        total = total + F.cross_entropy(
            resized[..., :height, :width], masks.long(), ignore_index=ignore_index, reduction="sum"
        )
    return total / (len(maps) * valid.clamp(min=1))
