"""SegViT and Shrunk SegViT: class queries whose attention over plain ViT tokens is the segmentation (ATM).

Paper     B. Zhang et al., "SegViT: Semantic Segmentation with Plain Vision Transformers", NeurIPS 2022,
          arXiv 2210.05844.
Idea      One query a class; the attention scores of the last cross attention, before the softmax and averaged over
          heads, are the masks; a linear layer says whether the class is present. Masks add up over backbone stages.
          Shrunk: inside the ViT only every second token stays a query (QD), beside it learned queries at full
          resolution gather the tokens of two depths (QU) and feed one ATM stage.
Differs   from the official code: any token grid (there: square), class tokens kept on request, masks interpolated over
          the padded area and cropped. `fixed_masks` and `fixed_queries` are the official way.
Checked   tests/golden/segvit__* (zbwxp/SegVit atm_head, tpn_atm_head, atm_single_head, vit_shrink, atm_loss).

Shapes    B images, K classes (= queries), H W pixels, h w token grid, N = h * w tokens, D backbone, C decoder channels,
          M heads, P present (image, class) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT, plain_vit
from segvit.contracts import Dense, Features, MaskScores, Readout, Size, UserError
from segvit.losses.binary import focal_and_dice
from segvit.losses.masks import present_classes
from segvit.nn.attention import Attention, init_packed, join_heads, split_heads
from segvit.nn.readout import bilinear_rows, mix_masks
from segvit.nn.rename import VIT_RULES, Rules, rename
from segvit.nn.tokens import map_tokens, patch_map, resize_positions


class AttentionToMask(nn.Module):
    """Cross attention that also gives its scores, before the softmax and averaged over heads."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor, *, with_masks: bool) -> tuple[Tensor, Tensor | None]:
        """(B, K, C), (B, N, C) -> the update (B, K, C) and, on request, the masks (B, K, N)."""
        q, k, v = (split_heads(t, self.heads) for t in (self.q(queries), self.k(memory), self.v(memory)))
        if not with_masks:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
            return self.proj(join_heads(mixed)), None
        scores = self.scale * (q @ k.mT)  # (B, M, K, N)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # masks are never in half precision
        return self.proj(join_heads(self.drop(scores.softmax(-1)).to(v.dtype) @ v)), scores.mean(1)


class DecoderLayer(nn.Module):
    """Post-norm decoder layer: self attention over the queries, `cross_attn` over the tokens, ReLU MLP."""

    def __init__(self, dim: int, cross_attn: nn.Module, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads=heads, dropout=dropout)
        self.cross_attn = cross_attn
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor, *, with_masks: bool = False) -> tuple[Tensor, Tensor | None]:
        masks: Tensor | None = None
        queries = self.norm1(queries + self.drop(self.self_attn(queries)))
        if isinstance(self.cross_attn, AttentionToMask):
            update, masks = self.cross_attn(queries, memory, with_masks=with_masks)
        else:
            update = self.cross_attn(queries, memory)
        queries = self.norm2(queries + self.drop(update))
        update = self.fc2(self.drop(F.relu(self.fc1(queries))))
        return self.norm3(queries + self.drop(update)), masks


class Stage(nn.Module):
    """Projection of one depth's tokens and the decoder layers that read them."""

    def __init__(self, in_dim: int | None, dim: int, *, layers: int, heads: int, dropout: float, masks: bool) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"the decoder's dim {dim} must be a multiple of its heads {heads}; set dim or heads")
        self.proj = nn.Linear(in_dim, dim) if in_dim else nn.Identity()
        self.proj_norm = nn.LayerNorm(dim) if in_dim else nn.Identity()
        cross = AttentionToMask if masks else Attention
        self.layers = nn.ModuleList(
            DecoderLayer(dim, cross(dim, heads=heads, dropout=dropout), heads=heads, dropout=dropout)
            for _ in range(layers)
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries after the last layer and, for ATM stages, that layer's masks (B, K, N)."""
        masks: Tensor | None = None
        memory = self.proj_norm(self.proj(tokens))
        for number, layer in enumerate(self.layers, start=1):
            queries, masks = layer(queries, memory, with_masks=number == len(self.layers))
        return queries, masks


class ATMHead(nn.Module):
    """The cascade: stages from deep to shallow, each adding its masks to the ones before."""

    def __init__(
        self, in_dim: int, dim: int, *, num_classes: int, heads: int, layers: int, stages: int,
        dropout: float, use_proj: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_classes, dim))
        source = in_dim if use_proj else None
        self.stages = nn.ModuleList(
            Stage(source, dim, layers=layers, heads=heads, dropout=dropout, masks=True) for _ in range(stages)
        )
        self.class_embed = nn.Linear(dim, num_classes + 1)
        init_head(self)

    def forward(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(B, D, h_i, w_i) from shallow to deep -> (class logits (B, K, K+1), masks (B, K, h, w)) a stage."""
        queries = self.queries.expand(maps[0].shape[0], -1, -1)
        size = maps[0].shape[-2:]  # the shallowest stage, processed last
        outputs: list[tuple[Tensor, Tensor]] = []
        for stage, features in zip(self.stages, reversed(maps), strict=True):
            queries, scores = stage(queries, map_tokens(features))
            masks = scores.unflatten(2, features.shape[-2:])
            if masks.shape[-2:] != size:
                masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
            masks = outputs[-1][1] + masks if outputs else masks
            outputs.append((self.class_embed(queries), masks))
        return outputs


class ShrunkHead(nn.Module):
    """QU: learned queries at full resolution read both depths in turn; then one ATM stage reads those queries."""

    def __init__(
        self, in_dim: int, dim: int, *, num_classes: int, heads: int, layers: int, stages: int, grid: Size,
        dropout: float, fixed_queries: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid, self.fixed_queries = grid, fixed_queries
        self.upsample_queries = nn.Parameter(torch.randn(grid[0] * grid[1], dim))
        self.stages = nn.ModuleList(
            Stage(in_dim, dim, layers=layers, heads=heads, dropout=dropout, masks=False) for _ in range(stages)
        )
        self.queries = nn.Parameter(torch.randn(num_classes, dim))
        self.atm = Stage(None, dim, layers=layers, heads=heads, dropout=dropout, masks=True)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        init_head(self)

    def forward(self, maps: Sequence[Tensor], grid: Size) -> list[tuple[Tensor, Tensor]]:
        """Maps from shallow to deep and the input's token grid -> (class logits, masks) a decoder layer."""
        grid = self.grid if self.fixed_queries else grid
        pixels = resize_positions(self.upsample_queries[None], old=self.grid, new=grid).expand(maps[0].shape[0], -1, -1)
        for stage, features in zip(self.stages, maps, strict=True):
            pixels, _ = stage(pixels, map_tokens(features))
        queries = self.queries.expand(pixels.shape[0], -1, -1)
        outputs: list[tuple[Tensor, Tensor]] = []
        for layer in self.atm.layers:  # every layer's masks are read, none are added up
            queries, scores = layer(queries, pixels, with_masks=True)
            outputs.append((self.class_embed(queries), scores.unflatten(2, grid)))
        return outputs


def init_head(head: nn.Module) -> None:
    """Linear layers truncated normal 0.02, biases 0; packed self-attention projections as torch initialises them."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for module in head.modules():
        if isinstance(module, Attention):
            init_packed(module)


def semantic(class_logits: Tensor, masks: Tensor) -> Tensor:
    """Class scores (B, K, h, w): softmax over classes and "no object", which is then left out, times the masks."""
    return mix_masks(class_logits.to(masks.dtype).softmax(-1)[..., :-1], masks.sigmoid())


def dense_output(outputs: list[tuple[Tensor, Tensor]], *, covers: Size, size: Size, fixed: Size | None) -> Dense:
    """The last output with the earlier ones as `aux{i}_*`. `fixed` is the official canvas: see SegViT."""
    class_logits, masks = outputs[-1]
    extras = {"class_logits": class_logits, "masks": masks}
    for index, (aux_logits, aux_masks) in enumerate(outputs[:-1]):
        extras |= {f"aux{index}_class_logits": aux_logits, f"aux{index}_masks": aux_masks}
    if fixed is None:
        return Dense(semantic(class_logits, masks), extras, covers)
    canvas = semantic(class_logits, F.interpolate(masks, size=fixed, mode="bilinear", align_corners=False))
    return Dense(canvas, extras | {"canvas": canvas}, size)


class SegViT(nn.Module):
    """A plain ViT and the ATM cascade.

    `fixed_masks` (the official way): token grids are read as squares, masks and scores live on a canvas of that size
    and are stretched to the input.
    """

    def __init__(self, backbone: PlainViT, head: ATMHead, *, fixed_masks: Size | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.fixed_masks = backbone, head, fixed_masks

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        maps = features.maps if self.fixed_masks is None else [square(m) for m in features.maps]
        size: Size = (images.shape[-2], images.shape[-1])
        out = dense_output(self.head(maps), covers=features.covers, size=size, fixed=self.fixed_masks)
        return out._replace(extras=features.extras | out.extras)


class ShrunkSegViT(nn.Module):
    """A plain ViT that goes on with every second token from block `shrink_at` (QD), and the QU head."""

    def __init__(
        self, backbone: PlainViT, head: ShrunkHead, *, shrink_at: int, fixed_masks: Size | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.shrink_at, self.fixed_masks = backbone, head, shrink_at, fixed_masks

    def forward(self, images: Tensor) -> Dense:
        features = self.shrunk_features(images)
        size: Size = (images.shape[-2], images.shape[-1])
        outputs = self.head(features.maps, features.grid)
        out = dense_output(outputs, covers=features.covers, size=size, fixed=self.fixed_masks)
        return out._replace(extras=features.extras | out.extras)

    def shrunk_features(self, images: Tensor) -> Features:
        """The backbone's maps; from block `shrink_at` on a quarter of the tokens."""
        vit = self.backbone
        step, maps = vit.embed(images), []
        for index in range(vit.out_indices[-1] + 1):
            if index == self.shrink_at:
                rows, columns = step.grid
                numbers = torch.arange(rows * columns, device=images.device).view(rows, columns)[::2, ::2]
                step = vit.run(index, step, keep=numbers.flatten(), grid=(numbers.shape[0], numbers.shape[1]))
            else:
                step = vit.run(index, step)
            if index == vit.out_indices[-1]:
                step = vit.gap(index + 1, step)
            if index in vit.out_indices:
                maps.append(patch_map(step))
        return vit.features(maps, step)


def square(features: Tensor) -> Tensor:
    """Tokens re-read as a square grid, as the official head does whatever the image's shape."""
    tokens = features.flatten(2)
    side = math.isqrt(tokens.shape[2])
    if side * side != tokens.shape[2]:
        raise UserError(f"fixed_masks reads tokens as a square, but there are {tokens.shape[2]}; leave fixed_masks out")
    return tokens.unflatten(2, (side, side))


def scores(out: Dense, size: Size, rows: range) -> Tensor:
    """Class scores (B, K, len(rows), W): masks resized to the band, then sigmoid, then mixed, as at full size."""
    if "canvas" in out.extras:
        return bilinear_rows(out.extras["canvas"], size, rows)
    low = out.extras["masks"]
    masks = bilinear_rows(low, out.covers, rows)[..., : size[1]]
    fresh = low.shape[-1] != out.covers[1] and not masks.requires_grad  # otherwise a view, or needed by a gradient
    return mix_masks(probabilities(out), masks.sigmoid_() if fresh else masks.sigmoid())


def probabilities(out: Dense) -> Tensor:
    """What each query (B, Q, K) says of the classes, without "no object"."""
    return out.extras["class_logits"].to(out.extras["masks"].dtype).softmax(-1)[..., :-1]


def mask_scores(out: Dense) -> MaskScores | None:
    """The sum that `scores` makes; of the official canvas, which is resized after the sum, there is none."""
    return None if "canvas" in out.extras else MaskScores(out.extras["masks"], probabilities(out))


READOUT = Readout(scores, keeps=("class_logits", "masks", "canvas"), confidence="share", masks=mask_scores)


def normalisers(masks: Tensor, *, num_classes: int, ignore_index: int) -> dict[str, Tensor]:
    """What the losses are divided by, summed over the global batch: `images` and `present` (image, class) pairs."""
    present = present_classes(masks, num_classes=num_classes, ignore_index=ignore_index)
    return {"images": torch.tensor(len(masks), device=masks.device), "present": present.sum()}


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, class_weight: float = 1.0, mask_weight: float = 20.0,
    dice_weight: float = 1.0, no_object: float = 0.1, alpha: float = 0.25, gamma: float = 2.0,
) -> dict[str, Tensor]:  # fmt: skip
    """ATMLoss: query k belongs to class k; the same three terms for the last output and, with `_i`, the earlier ones.

    Masks (B, H, W) integer; `totals` are the normalisers of the global batch. Only present classes have mask terms.
    `class_weights` (K,) multiply the three terms of each present (image, class) pair and not their divisors; "no
    object" keeps its own weight. None is the paper's loss.
    """
    num_classes = out.logits.shape[1]
    dtype = torch.promote_types(out.logits.dtype, torch.float32)  # losses never in half precision
    present = present_classes(masks, num_classes=num_classes, ignore_index=ignore_index)
    pairs = present.nonzero()  # (P, 2)
    labels = torch.where(present, torch.arange(num_classes, device=masks.device), num_classes)
    balance = torch.ones(num_classes, device=masks.device) if class_weights is None else class_weights
    balance = balance.to(dtype)
    weights, pair_weights = torch.where(present, balance, no_object), balance[pairs[:, 1]]  # (B, K), (P,)
    count = totals["present"].to(dtype)
    class_total = count + no_object * (totals["images"] * num_classes - count)
    losses: dict[str, Tensor] = {}
    auxiliary = sum(name.startswith("aux") and name.endswith("_masks") for name in out.extras)
    for source, suffix in [("", "")] + [(f"aux{i}_", f"_{i}") for i in range(auxiliary)]:
        class_logits, logits = out.extras[f"{source}class_logits"].to(dtype), out.extras[f"{source}masks"]
        entropy = F.cross_entropy(class_logits.mT, labels, reduction="none")  # (B, K)
        losses[f"loss_ce{suffix}"] = class_weight * (weights * entropy).sum() / class_total
        chosen = logits[pairs[:, 0], pairs[:, 1]].to(dtype)  # (P, h, w)
        terms = focal_and_dice(chosen, masks, pairs, covers=out.covers, alpha=alpha, gamma=gamma)
        focal, dice = ((pair_weights * term).sum() / count.clamp(min=1) for term in terms)
        losses |= {f"loss_mask{suffix}": mask_weight * focal, f"loss_dice{suffix}": dice_weight * dice}
    return losses


def segvit(
    *,
    num_classes: int,
    backbone: str,
    weights: str | None = None,
    image_size: int | Size = 512,
    out_indices: Sequence[int],
    dim: int | None = None,
    heads: int | None = None,
    layers: int = 3,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    attention_drop_path: bool = False,
    prefix_tokens: Literal["keep", "drop"] = "drop",
    final_norm: bool = False,
    checkpointing: bool = False,
    fixed_masks: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> SegViT:
    """SegViT on any plain ViT of timm; the named variants fix `backbone` and `out_indices`.

    `dim` and `heads` of the decoder default to half the backbone's width and one head per 64 of it. The class token is
    dropped and stochastic depth acts on the MLP branch only, as the published weights were trained; keep the prefix
    tokens (`prefix_tokens="keep"`) for DINOv2, DINOv3, EVA-02 and CLIP. `patch_size`, `depth` and `embed_dim` change
    the architecture for training from nothing.
    """
    vit = plain_vit(
        backbone, image_size=image_size, out_indices=out_indices, weights=weights, prefix_tokens=prefix_tokens,
        final_norm=final_norm, drop_path=drop_path, attention_drop_path=attention_drop_path,
        checkpointing=checkpointing, patch_size=patch_size, depth=depth, embed_dim=embed_dim, in_channels=in_channels,
    )  # fmt: skip
    head = ATMHead(
        vit.dim, dim or vit.dim // 2, num_classes=num_classes, heads=heads or max(1, vit.dim // 64), layers=layers,
        stages=len(vit.out_indices), dropout=dropout,
    )  # fmt: skip
    return SegViT(vit, head, fixed_masks=as_size(image_size) if fixed_masks else None)


def segvit_shrunk(
    *,
    num_classes: int,
    backbone: str,
    weights: str | None = None,
    image_size: int | Size = 512,
    out_indices: Sequence[int],
    shrink_at: int,
    dim: int | None = None,
    heads: int | None = None,
    layers: int = 3,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    attention_drop_path: bool = False,
    prefix_tokens: Literal["keep", "drop"] = "drop",
    checkpointing: bool = False,
    fixed_masks: bool = False,
    fixed_queries: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> ShrunkSegViT:
    """Shrunk SegViT on any plain ViT of timm: tokens are quartered at block `shrink_at` (0-based).

    The learned full-resolution queries follow `image_size`; for other inputs they are resized to the input's token
    grid, unless `fixed_queries`. `fixed_masks` stretches scores from a canvas of `image_size`. Other keywords as in
    `segvit`.
    """
    vit = plain_vit(
        backbone, image_size=image_size, out_indices=out_indices, weights=weights, prefix_tokens=prefix_tokens,
        drop_path=drop_path, attention_drop_path=attention_drop_path, checkpointing=checkpointing,
        patch_size=patch_size, depth=depth, embed_dim=embed_dim, in_channels=in_channels,
    )  # fmt: skip
    if not 0 <= shrink_at <= vit.out_indices[-1]:
        raise UserError(f"shrink_at {shrink_at} must be a block up to the last output, 0..{vit.out_indices[-1]}")
    head = ShrunkHead(
        vit.dim, dim or vit.dim // 2, num_classes=num_classes, heads=heads or max(1, vit.dim // 64), layers=layers,
        stages=len(vit.out_indices), grid=vit.pretrained_grid, dropout=dropout, fixed_queries=fixed_queries,
    )  # fmt: skip
    canvas = as_size(image_size) if fixed_masks else None
    return ShrunkSegViT(vit, head, shrink_at=shrink_at, fixed_masks=canvas)


def as_size(size: int | Size) -> Size:
    """A side or a pair as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# Section "Variants" of the official configurations; tiny and small follow the same proportions.
segvit_vit_tiny = partial(segvit, backbone="vit_tiny_patch16_384", out_indices=(5, 7, 11))
segvit_vit_small = partial(segvit, backbone="vit_small_patch16_384", out_indices=(5, 7, 11))
segvit_vit_base = partial(segvit, backbone="vit_base_patch16_384", out_indices=(5, 7, 11))
segvit_vit_large = partial(segvit, backbone="vit_large_patch16_384", out_indices=(7, 15, 23))
segvit_shrunk_vit_tiny = partial(segvit_shrunk, backbone="vit_tiny_patch16_384", out_indices=(5, 11), shrink_at=6)
segvit_shrunk_vit_small = partial(segvit_shrunk, backbone="vit_small_patch16_384", out_indices=(5, 11), shrink_at=6)
segvit_shrunk_vit_base = partial(segvit_shrunk, backbone="vit_base_patch16_384", out_indices=(5, 11), shrink_at=6)
segvit_shrunk_vit_large = partial(segvit_shrunk, backbone="vit_large_patch16_384", out_indices=(7, 23), shrink_at=8)

UNUSED = r"empty_weight$|^decode_head\.conv_seg\."  # constant loss weights; a layer the official head deletes
LAYER: Rules = (
    (r"\.self_attn\.in_proj_", ".self_attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".self_attn.proj."),
    (r"\.multihead_attn\.in_proj_", ".cross_attn.qkv."),
    (r"\.multihead_attn\.out_proj\.", ".cross_attn.proj."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.linear([12])\.", r".fc\1."),
)
CASCADE: Rules = (
    (r"^decode_head\.q\.weight$", "head.queries"),
    *((rf"^decode_head\.input_proj_{s}\.", f"head.stages.{s - 1}.proj.") for s in range(1, 10)),
    *((rf"^decode_head\.proj_norm_{s}\.", f"head.stages.{s - 1}.proj_norm.") for s in range(1, 10)),
    *((rf"^decode_head\.decoder_{s}\.", f"head.stages.{s - 1}.") for s in range(1, 10)),
    (r"^decode_head\.", "head."),
    *LAYER,
)
SHRUNK: Rules = (
    (r"^decode_head\.q\.weight$", "head.upsample_queries"),
    (r"^decode_head\.atm\.q\.weight$", "head.queries"),
    (r"^decode_head\.atm\.decoder_1\.", "head.atm."),
    (r"^decode_head\.atm\.class_embed\.", "head.class_embed."),
    *CASCADE[1:],
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (zbwxp/SegVit; backbone in mmseg's or timm's names) into ours, plain and Shrunk."""
    shrunk = any(key.startswith("decode_head.atm.") for key in state)
    return rename(state, [*VIT_RULES, *(SHRUNK if shrunk else CASCADE)], unused=UNUSED)
