"""FTN: the pyramid group transformer, an FPN neck, and a feature pyramid transformer that adds three branches.

Paper     S. Wu, T. Wu, F. Lin, S. Tian, G. Guo, "Fully Transformer Networks for Semantic Image Segmentation", arXiv
          2106.04108. Only its abstract and the authors' code were at hand.
Idea      Each level of the pyramid passes through as many transformer stages as it needs doublings to 1/8, the coarsest
          through three; the branches are added and classified.
Differs   from the authors' code (a pull request that was never merged): its head exchanges height and width after every
          stage, which misplaces branches on square images and fails on others; here the order is right. The auxiliary
          head reads the neck's 1/16 map, as their configuration says in its own framework.
Checked   tests/golden/ftn__* (open-mmlab/mmsegmentation pull request 1489, with the order corrected).

Shapes    B images, K classes, branch b on a map h w of D channels, N = h * w tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from segvit.backbones.pgt import PGT, pgt
from segvit.backbones.pvt import ReducedAttention, init
from segvit.contracts import Dense, Features, Readout, Size, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.pixel import pixel_losses
from segvit.nn.fpn import FPN, FPN_RULES
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename

AUX_LEVEL = 1  # of the neck: stride 16


class FPTBlock(nn.Module):
    """Pre-norm transformer block with PVT's spatial-reduction attention."""

    def __init__(self, dim: int, *, heads: int, ratio: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ReducedAttention(dim, heads=heads, qkv_bias=True, reduction=reduction)
        self.mlp = Mlp(dim, ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FPTHead(nn.Module):
    """The feature pyramid transformer: maps of one width from fine to coarse -> logits at the finest stride.

    `blocks[b][s]` is the number of blocks in stage s of branch b, the coarsest branch first, and `reductions` their
    spatial reduction. `position_sizes` adds a learned map of that size at the start of each branch.
    """

    def __init__(
        self, dim: int, *, num_classes: int, heads: int = 4, ratio: int = 4,
        blocks: Sequence[Sequence[int]] = ((1, 1, 1), (1, 1), (1,)),
        reductions: Sequence[Sequence[int]] = ((2, 2, 2), (2, 2), (2,)),
        position_sizes: Sequence[int] | None = None, dropout: float = 0.1, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(
                    FPTBlock(dim, heads=heads, ratio=ratio, reduction=reductions[b][s], drop_path=drop_path)
                    for _ in range(count)
                )
                for s, count in enumerate(counts)
            )
            for b, counts in enumerate(blocks)
        )
        self.apply(init)
        self.positions = nn.ParameterList(nn.Parameter(torch.zeros(1, dim, n, n)) for n in position_sizes or ())
        for position in self.positions:
            nn.init.trunc_normal_(position, std=0.02)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.constant_(self.classify.get_parameter("bias"), 0.0)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The logits and the branches' outputs, the coarsest first."""
        size = (levels[0].shape[-2], levels[0].shape[-1])
        outputs = [self.branch(b, level, size) for b, level in enumerate(reversed(levels))]
        return self.classify(self.drop(torch.stack(outputs).sum(0))), outputs

    def branch(self, b: int, x: Tensor, size: Size) -> Tensor:
        """The stages of a branch with a doubling between two; at the end (B, D, *size)."""
        if len(self.positions):
            grid = (x.shape[-2], x.shape[-1])
            x = x + F.interpolate(self.positions[b], size=grid, mode="bilinear", align_corners=False)
        for s, stage in enumerate(self.branches[b].children()):
            if s:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = run(stage, x)
        if (x.shape[-2], x.shape[-1]) == size:
            return x
        # Odd maps: two doublings of a halved odd side miss it by a row.
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def run(stage: nn.Module, x: Tensor) -> Tensor:
    """The blocks of a stage on a map (B, D, h, w)."""
    grid = (x.shape[-2], x.shape[-1])
    tokens = x.flatten(2).mT
    for block in stage.children():
        tokens = block(tokens, grid)
    return tokens.mT.unflatten(2, grid)


class FTN(nn.Module):
    """Encoder, neck and decoder; logits at stride 8. The auxiliary head runs in training only."""

    def __init__(self, backbone: PGT, fpn: FPN, head: FPTHead, aux: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.fpn, self.head = backbone, fpn, head
        self.aux_head = aux

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        levels = self.fpn(features.maps)
        logits, _ = self.head(levels)
        aux = self.aux_head if self.training else None
        extras = {} if aux is None else {"aux": aux(levels[AUX_LEVEL])}
        return Dense(logits, features.extras | extras, features.covers)


def fcn_head(inputs: int, dim: int, *, num_classes: int, dropout: float) -> nn.Sequential:
    """The auxiliary head: 3x3 convolution, BatchNorm, ReLU, dropout, classifier."""
    classify = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(classify.weight, std=0.01)
    return nn.Sequential(
        nn.Conv2d(inputs, dim, 3, padding=1, bias=False),
        nn.BatchNorm2d(dim),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        classify,
    )


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 1.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 0.0, gamma: float = 2.0, ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000, aux_weight: float = 0.4,
) -> dict[str, Tensor]:  # fmt: skip
    """Cross entropy as mmsegmentation takes it, a mean over all pixels with 0 for ignored ones, of both heads."""
    totals = totals | {"valid": totals["pixels"]}
    parts = {"loss_": (out.logits, 1.0)}
    if "aux" in out.extras and aux_weight:
        parts["loss_aux_"] = (out.extras["aux"], aux_weight)
    losses: dict[str, Tensor] = {}
    for prefix, (logits, weight) in parts.items():
        terms = pixel_losses(
            logits_at(out._replace(logits=logits), masks), masks, totals, ignore_index=ignore_index,
            class_weights=class_weights, cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem,
            gamma=gamma, ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
        )  # fmt: skip
        losses |= {name.replace("loss_", prefix): weight * value for name, value in terms.items()}
    return losses


def ftn(
    *,
    num_classes: int,
    backbone: str = "pgt_small",
    dim: int = 512,
    heads: int = 4,
    aux: bool = True,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    depths: Sequence[int] | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> FTN:
    """FTN on one of the four PGTs; `aux` is the auxiliary head. The authors' drop_path is 0.3 for base and large.

    `dim` and `heads` are the decoder's. `depths` and `embed_dim` change the backbone, for training from nothing.
    """
    if dim % heads:
        raise UserError(f"the decoder's dim {dim} must be a multiple of its heads {heads}; set dim or heads")
    encoder = pgt(backbone, drop_path=drop_path, depths=depths, embed_dim=embed_dim, in_channels=in_channels)
    head = FPTHead(dim, num_classes=num_classes, heads=heads, dropout=dropout)
    early = fcn_head(dim, 256, num_classes=num_classes, dropout=dropout) if aux else None
    return FTN(encoder, FPN(encoder.dims, dim), head, early)


ftn_tiny = partial(ftn, backbone="pgt_tiny")
ftn_small = partial(ftn, backbone="pgt_small")
ftn_base = partial(ftn, backbone="pgt_base", drop_path=0.3)
ftn_large = partial(ftn, backbone="pgt_large", drop_path=0.3)

OFFICIAL: Rules = (
    *FPN_RULES,
    (r"\bffn\.layers\.0\.0\.", "mlp.fc1."),
    (r"\bffn\.layers\.1\.", "mlp.fc2."),
    (r"\bcpe\.conv\.", "cpe."),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"^decode_head\.conv_seg\.", "head.classify."),
    (r"^decode_head\.ape_embeds\.", "head.positions."),
    (r"^decode_head\.", "head."),
    (r"^auxiliary_head\.convs\.0\.conv\.", "aux_head.0."),
    (r"^auxiliary_head\.convs\.0\.bn\.", "aux_head.1."),
    (r"^auxiliary_head\.conv_seg\.", "aux_head.4."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints of the authors' pull request into ours."""
    return rename(state, OFFICIAL, unused=r"(?!)")
