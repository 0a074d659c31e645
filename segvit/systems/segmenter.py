"""Segmenter: a plain ViT with a linear decoder or the mask transformer; the peer that SegViT is compared with.

Paper     R. Strudel, R. Garcia, I. Laptev, C. Schmid, "Segmenter: Transformer for Semantic Segmentation", ICCV 2021,
          arXiv 2105.05633.
Idea      Class embeddings run through two transformer blocks together with the patch tokens; a mask is the cosine
          similarity of patch and class embedding.
Differs   from the official code: none known; all LayerNorms have eps 1e-5 there, in the encoder too.
Checked   tests/golden/segmenter__mask_transformer (rstrudel/segmenter decoder.py).

Shapes    B images, K classes, h w token grid, N = h * w tokens, D encoder, C decoder channels.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT, plain_vit
from segvit.contracts import Dense, Readout, Size
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.pixel import pixel_losses
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import map_tokens


class MaskTransformer(nn.Module):
    """Patch tokens (B, N, D) -> class masks (B, K, N)."""

    def __init__(
        self, in_dim: int, dim: int, *, num_classes: int, layers: int, heads: int, hidden: int,
        dropout: float = 0.0, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        self.proj_dec = nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden / dim, qkv_bias=True, proj_drop=dropout, attn_drop=dropout,
                  drop_path=drop_path * i / max(layers - 1, 1), norm_layer=nn.LayerNorm)
            for i in range(layers)
        )  # fmt: skip
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, dim))
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.decoder_norm = nn.LayerNorm(dim)
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.proj_dec(tokens), self.cls_emb.expand(tokens.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.num_classes], x[:, -self.num_classes :]
        patches = F.normalize(patches @ self.proj_patch, dim=-1)
        classes = F.normalize(classes @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.mT).mT


class LinearDecoder(nn.Module):
    """One linear layer a token: (B, N, D) -> (B, K, N)."""

    def __init__(self, in_dim: int, *, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(tokens).mT


class Segmenter(nn.Module):
    """Encoder and decoder; logits at the token grid."""

    def __init__(self, backbone: PlainViT, decoder: MaskTransformer | LinearDecoder) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, images: Tensor) -> Dense:
        features = self.backbone(images)
        tokens = map_tokens(features.maps[-1])
        return Dense(self.decoder(tokens).unflatten(2, features.grid), features.extras, features.covers)


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 1.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 0.0, gamma: float = 2.0, ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000,
) -> dict[str, Tensor]:  # fmt: skip
    """Cross entropy over the pixels that are not ignored; `pixel_losses` says what else there is."""
    return pixel_losses(
        logits_at(out, masks), masks, totals, ignore_index=ignore_index, class_weights=class_weights,
        cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem, gamma=gamma,
        ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
    )  # fmt: skip


def segmenter(
    *,
    num_classes: int,
    backbone: str,
    decoder: Literal["mask_transformer", "linear"] = "mask_transformer",
    weights: str | None = None,
    image_size: int | Size = 512,
    layers: int = 2,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    checkpointing: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> Segmenter:
    """Segmenter on any plain ViT of timm; the named variants fix `backbone` (and `decoder`)."""
    vit = plain_vit(
        backbone, image_size=image_size, out_indices=(-1,), weights=weights, prefix_tokens="keep",
        final_norm=True, position_mode="bilinear", drop_path=drop_path, norm_eps=1e-5, checkpointing=checkpointing,
        patch_size=patch_size, depth=depth, embed_dim=embed_dim, in_channels=in_channels,
    )  # fmt: skip
    if decoder == "linear":
        return Segmenter(vit, LinearDecoder(vit.dim, num_classes=num_classes))
    head = MaskTransformer(
        vit.dim, vit.dim, num_classes=num_classes, layers=layers, heads=max(1, vit.dim // 64), hidden=4 * vit.dim,
        dropout=dropout,
    )  # fmt: skip
    return Segmenter(vit, head)


segmenter_vit_tiny = partial(segmenter, backbone="vit_tiny_patch16_384")
segmenter_vit_small = partial(segmenter, backbone="vit_small_patch16_384")
segmenter_vit_base = partial(segmenter, backbone="vit_base_patch16_384")
segmenter_vit_large = partial(segmenter, backbone="vit_large_patch16_384")
segmenter_linear_vit_base = partial(segmenter, backbone="vit_base_patch16_384", decoder="linear")

OFFICIAL: Rules = ((r"^encoder\.", "backbone."),)
UNUSED = r"^encoder\.(head|head_dist|pre_logits)\."  # the image classifier, which no token map passes through


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (rstrudel/segmenter) into ours."""
    return rename(state, OFFICIAL, unused=UNUSED)
