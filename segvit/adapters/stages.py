"""Stages of a backbone, for adapters that act between them, and blocks that take the place of others.

A plain ViT has four groups of equally many blocks, fewer where it has fewer blocks; a pyramid has the stages whose maps
it returns.
"""

from __future__ import annotations

from timm.models import FeatureListNet
from torch import nn

from segvit.backbones.pvt import PVT
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import UserError

GROUPS = 4


def gaps_behind_stages(backbone: nn.Module) -> list[tuple[str, int]]:
    """The gap behind each stage, such as `gaps.3`, and its number of channels.

    Raises UserError for a backbone without gaps.
    """
    if isinstance(backbone, PlainViT):
        return [(f"gaps.{end}", backbone.dim) for end in group_ends(backbone)]
    if isinstance(backbone, PVT) or (isinstance(backbone, Pyramid) and isinstance(backbone.network, FeatureListNet)):
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
