"""Semantic FPN: a feature pyramid network whose levels are brought to stride 4 and added; the decoder of PVT.

Paper     A. Kirillov, R. Girshick, K. He, P. Dollar, "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446;
          on PVT: W. Wang et al., ICCV 2021, arXiv 2102.12122.
Idea      1x1 convolutions and a top-down sum make four maps of one width; each is convolved and upsampled in steps to
          stride 4; their sum is classified.
Differs   from mmsegmentation's code: nothing known.
Checked   tests/golden/semfpn__*, pvt__semfpn_full (open-mmlab/mmsegmentation 0.24.0 fpn.py, fpn_head.py).

Shapes    B images, K classes, level i with C_i channels at stride s_i, P pyramid width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from segvit.backbones.pvt import DEPTHS, PVT, STRIDES, pvt
from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.contracts import Dense, Features, Readout, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.pixel import pixel_losses
from segvit.nn.fpn import FPN, FPN_RULES, HEAD_RULES, FPNHead
from segvit.nn.readout import logit_rows
from segvit.nn.rename import PVT_V2_RULES, Rules, rename


class SemanticFPN(nn.Module):
    """Any pyramid with strides that double."""

    def __init__(self, backbone: PVT | Pyramid, fpn: FPN, head: FPNHead) -> None:
        super().__init__()
        self.backbone, self.fpn, self.head = backbone, fpn, head

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        return Dense(self.head(self.fpn(features.maps)), features.extras, features.covers)


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 1.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 0.0, gamma: float = 2.0, ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000,
) -> dict[str, Tensor]:  # fmt: skip
    """Cross entropy as mmsegmentation takes it, a mean over all pixels with 0 for ignored ones; or other losses."""
    return pixel_losses(
        logits_at(out, masks), masks, totals | {"valid": totals["pixels"]}, ignore_index=ignore_index,
        class_weights=class_weights, cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem,
        gamma=gamma, ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
    )  # fmt: skip


def semantic_fpn(
    *,
    num_classes: int,
    backbone: str = "pvt_v2_b2",
    weights: str | None = None,
    position_size: int | None = None,
    fpn_dim: int = 256,
    head_dim: int = 128,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    in_channels: int = 3,
) -> SemanticFPN:
    """Semantic FPN on PVT v1 (`pvt_tiny` ... `pvt_large`) or any pyramid of timm with doubling strides.

    `weights` is a local official checkpoint for PVT v1, else a hub name or a local file. `position_size` is the side of
    the images that position embeddings or windows are made for (PVT v1: 224), where the backbone has such. `depths` and
    `dims` change PVT v1, for training from nothing.
    """
    trunk: PVT | Pyramid
    if backbone in DEPTHS:
        trunk = pvt(
            backbone, weights=weights, image_size=position_size or 224, drop_path=drop_path, depths=depths, dims=dims,
            in_channels=in_channels,
        )  # fmt: skip
        strides = list(STRIDES)
    else:
        if depths is not None or dims is not None:
            raise UserError(
                f"{backbone} has its own depths and dims; leave both out, or choose from {', '.join(DEPTHS)}"
            )
        trunk = pyramid(
            backbone, weights=weights, drop_path=drop_path, in_channels=in_channels, image_size=position_size
        )
        strides = trunk.strides
    if any(second != 2 * first for first, second in itertools.pairwise(strides)):
        raise UserError(f"{backbone} has strides {strides}; Semantic FPN needs each to be twice the one before")
    head = FPNHead(fpn_dim, head_dim, strides=strides, num_classes=num_classes, dropout=dropout)
    return SemanticFPN(trunk, FPN(trunk.dims, fpn_dim), head)


semantic_fpn_pvt_tiny = partial(semantic_fpn, backbone="pvt_tiny")
semantic_fpn_pvt_small = partial(semantic_fpn, backbone="pvt_small")
semantic_fpn_pvt_medium = partial(semantic_fpn, backbone="pvt_medium")
semantic_fpn_pvt_large = partial(semantic_fpn, backbone="pvt_large")
semantic_fpn_pvt_v2_b0 = partial(semantic_fpn, backbone="pvt_v2_b0")
semantic_fpn_pvt_v2_b2 = partial(semantic_fpn, backbone="pvt_v2_b2")

OFFICIAL: Rules = (*FPN_RULES, *HEAD_RULES)
UNUSED = r"^backbone\.(cls_token$|norm\.|head\.)"


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (whai362/PVT and PVTv2-Seg, mmsegmentation's FPN and FPNHead) into ours."""
    second = "backbone.norm1.weight" in state
    return rename(state, [*OFFICIAL, *PVT_V2_RULES] if second else OFFICIAL, unused=UNUSED)
