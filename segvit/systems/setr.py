"""SETR: a plain ViT under convolutional decoders (naive, PUP, MLA), and the same on HLG transformers.

Paper     S. Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers",
          CVPR 2021, arXiv 2012.15840; HLG: L. Zhang et al., IJCV 2024, arXiv 2207.09339.
Idea      Naive: two 1 x 1 convolutions on the last tokens. PUP: four 3 x 3 convolutions, doubling after each. MLA: four
          depths, added up from deep to shallow, each convolved, then concatenated. Heads on the depths between add
          their losses in training. HLG: four strides concatenated, then attention in windows.
Differs   from the official code: any image size (there: one fixed square); the last resize is the readout's, straight
          from the head's own grid; a class token is known and not guessed from the number of tokens. The official HLG
          decoder uses files that were never published: its windows here are those of the HLG backbone.
Checked   tests/golden/setr__* (fudan-zvg/SETR vit.py, vit_mla.py, vit_up_head.py, vit_mla_head.py).

Shapes    B images, K classes, h w token grid, D backbone, C decoder channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from segvit.backbones import hlg
from segvit.backbones.hlg import HLG, WindowAttention, from_windows, to_windows, window_mask
from segvit.backbones.vit import PlainViT, plain_vit
from segvit.contracts import Dense, Readout, Size, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.pixel import pixel_losses
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename

Maps = Sequence[Tensor]  # (B, D_i, h_i, w_i) from shallow to deep


def conv_norm(in_dim: int, dim: int, kernel: int, *, bias: bool = False) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the map keeps its size."""
    conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU())


def resize(maps: Tensor, size: Size) -> Tensor:
    """Bilinear, between cell centres."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def enlarge(maps: Tensor, factor: int) -> Tensor:
    """Both sides times `factor`."""
    return resize(maps, (factor * maps.shape[-2], factor * maps.shape[-1]))


class UpHead(nn.Module):
    """Convolutions on the last map with a doubling between them: logits (B, K, s h, s w), s = 2^(convs - 1) * factor.

    naive: one 1 x 1 convolution; PUP: four 3 x 3; PUP's auxiliary heads: one 3 x 3 and `factor` 4.
    """

    def __init__(self, in_dim: int, *, num_classes: int, width: int, kernel: int, convs: int, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        self.norm = LayerNorm2d(in_dim, eps=1e-6)
        self.convs = nn.ModuleList(conv_norm(width if i else in_dim, width, kernel, bias=True) for i in range(convs))
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Maps) -> Tensor:
        x = self.norm(maps[-1])
        for number, conv in enumerate(self.convs):
            x = conv(enlarge(x, 2) if number else x)
        logits = self.classify(x)
        # The official auxiliary head classifies after the resize: a 1 x 1 convolution gives the same on either side.
        return enlarge(logits, self.factor) if self.factor > 1 else logits


class Aggregation(nn.Module):
    """MLA's neck: every map normalised, projected to C channels, added to all deeper ones, convolved."""

    def __init__(self, dims: Sequence[int], width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6) for dim in dims)
        self.reduce = nn.ModuleList(conv_norm(dim, width, 1) for dim in dims)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in dims)

    def forward(self, maps: Maps) -> list[Tensor]:
        sums: list[Tensor] = []  # from deep to shallow
        for m, norm, reduce in zip(reversed(maps), reversed(self.norms), reversed(self.reduce), strict=True):
            x = reduce(norm(m))
            if sums:
                same = sums[-1].shape[-2:] == x.shape[-2:]  # a plain ViT's maps are, a pyramid's are not
                x = x + (sums[-1] if same else resize(sums[-1], (x.shape[-2], x.shape[-1])))
            sums.append(x)
        return [smooth(x) for smooth, x in zip(self.smooth, reversed(sums), strict=True)]


class MLAHead(nn.Module):
    """Two convolutions a map, all `factor` times as large as the first map, and one over their concatenation."""

    def __init__(self, in_dim: int, width: int, *, levels: int, num_classes: int, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor
        self.branches = nn.ModuleList(
            nn.Sequential(conv_norm(in_dim, width, 3), conv_norm(width, width, 3)) for _ in range(levels)
        )
        self.classify = nn.Conv2d(levels * width, num_classes, 3, padding=1)

    def forward(self, maps: Maps) -> Tensor:
        return self.classify(self.concatenate(maps))

    def concatenate(self, maps: Maps) -> Tensor:
        """What is classified: (B, levels * C, factor * h, factor * w)."""
        size: Size = (self.factor * maps[0].shape[-2], self.factor * maps[0].shape[-1])
        # Corners are aligned here and nowhere else (vit_mla_head.py): the released weights were trained so.
        return torch.cat(
            [
                F.interpolate(branch(m), size=size, mode="bilinear", align_corners=True)
                for branch, m in zip(self.branches, maps, strict=True)
            ],
            dim=1,
        )


class WindowLayer(nn.Module):
    """Pre-norm transformer layer whose attention stays inside 7 x 7 windows."""

    def __init__(self, dim: int, *, heads: int, dilated: bool) -> None:
        super().__init__()
        self.dilated = dilated
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-6), LayerNorm2d(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attention = WindowAttention(dim, heads=heads)
        self.mlp = nn.Sequential(nn.Conv2d(dim, 4 * dim, 1), nn.GELU(), nn.Conv2d(4 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        size: Size = (x.shape[-2], x.shape[-1])
        q, k, v = self.qkv(to_windows(self.norm1(x), dilated=self.dilated)).chunk(3, dim=-1)
        mixed = self.proj(self.attention(q, k, v, window_mask(x, dilated=self.dilated)))
        x = x + from_windows(mixed, size, dilated=self.dilated)
        return x + self.mlp(self.norm2(x))


class HLGHead(nn.Module):
    """All maps at the finest grid, fused by a convolution, then one layer of local and one of dilated windows."""

    def __init__(self, dims: Sequence[int], width: int, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        if width % 32:
            raise UserError(f"the decoder has one head per 32 channels, so its width {width} must be a multiple of 32")
        self.fuse = conv_norm(sum(dims), width, 3)
        self.layers = nn.Sequential(
            *(WindowLayer(width, heads=width // 32, dilated=dilated) for dilated in (False, True))
        )
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Maps) -> Tensor:
        size: Size = (maps[0].shape[-2], maps[0].shape[-1])
        x = self.fuse(torch.cat([maps[0], *(resize(m, size) for m in maps[1:])], dim=1))
        return self.classify(self.drop(self.layers(x)))


class AuxHead(nn.Module):
    """A classifier of the last map: alone and without bias (MLA), or after a 3 x 3 convolution (HLG: mmseg's FCN)."""

    def __init__(self, in_dim: int, *, num_classes: int, width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = conv_norm(in_dim, width, 3) if width else nn.Identity()
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width or in_dim, num_classes, 1, bias=width is not None)

    def forward(self, maps: Maps) -> Tensor:
        return self.classify(self.drop(self.conv(maps[-1])))


class SETR(nn.Module):
    """A backbone, MLA's aggregation where there is one, the head, and auxiliary heads by number of their map.

    Auxiliary heads run in training only; each gets the maps up to its own. Logits stay at the head's grid.
    """

    def __init__(
        self, backbone: PlainViT | HLG, head: nn.Module, aux_heads: Mapping[int, nn.Module],
        *, aggregation: Aggregation | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.aggregation = aggregation
        self.head = head
        self.aux_heads = nn.ModuleDict({str(level): aux for level, aux in aux_heads.items()})

    def forward(self, images: Tensor) -> Dense:
        features = self.backbone(images)
        maps = features.maps if self.aggregation is None else self.aggregation(features.maps)
        extras = dict(features.extras)
        if self.training:
            extras |= {f"aux{level}_logits": aux(maps[: int(level) + 1]) for level, aux in self.aux_heads.items()}
        return Dense(self.head(maps), extras, features.covers)


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255, aux_weight: float = 0.4,
    class_weights: Tensor | None = None, cross_entropy: float = 1.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 0.0, gamma: float = 2.0, ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000,
) -> dict[str, Tensor]:  # fmt: skip
    """The same pixel losses for the head and, with `_i` and times `aux_weight`, for each auxiliary head.

    As in mmsegmentation, means are over all pixels: ignored ones add nothing but count. See `pixel_losses`.
    """
    losses: dict[str, Tensor] = {}
    totals = totals | {"valid": totals["pixels"]}
    aux = {name.removesuffix("_logits").removeprefix("aux"): value for name, value in out.extras.items()
           if name.startswith("aux") and name.endswith("_logits")}  # fmt: skip
    for suffix, weight, logits in [("", 1.0, out.logits)] + [(f"_{i}", aux_weight, value) for i, value in aux.items()]:
        terms = pixel_losses(
            logits_at(out._replace(logits=logits), masks), masks, totals, ignore_index=ignore_index,
            class_weights=class_weights, cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem,
            gamma=gamma, ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
        )  # fmt: skip
        losses |= {f"{name}{suffix}": weight * value for name, value in terms.items()}
    return losses


def decode(
    backbone: PlainViT | HLG, dims: Sequence[int], decoder: Literal["naive", "pup", "mla"], *, num_classes: int,
    width: int,
) -> SETR:  # fmt: skip
    """A backbone whose maps have `dims` channels under one of the three decoders with its auxiliary heads."""
    levels, last = range(len(dims)), dims[-1]
    if decoder == "mla":
        if width % 2:
            raise UserError(f"MLA's branches have half its width, so {width} must be even")
        aux = {i: AuxHead(width, num_classes=num_classes) for i in levels}
        factor = 1 if isinstance(backbone, HLG) else 4  # to stride 4, as from patches of 16
        head = MLAHead(width, width // 2, levels=len(dims), num_classes=num_classes, factor=factor)
        return SETR(backbone, head, aux, aggregation=Aggregation(dims, width))
    if decoder == "pup":
        shape: dict[str, int] = {"num_classes": num_classes, "width": width, "kernel": 3}
        heads = {i: UpHead(dims[i], convs=1, factor=4, **shape) for i in levels}
        return SETR(backbone, UpHead(last, convs=4, **shape), heads)
    shape = {"num_classes": num_classes, "width": width, "kernel": 1, "convs": 1}
    return SETR(backbone, UpHead(last, **shape), {i: UpHead(dims[i], **shape) for i in levels[:-1]})


def setr(
    *,
    num_classes: int,
    backbone: str,
    decoder: Literal["naive", "pup", "mla"],
    weights: str | None = None,
    image_size: int | Size = 512,
    out_indices: Sequence[int],
    width: int = 256,
    drop_path: float = 0.0,
    prefix_tokens: Literal["keep", "drop"] = "keep",
    checkpointing: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> SETR:
    """SETR on any plain ViT of timm; the named variants fix `backbone`, `decoder` and `out_indices`.

    The head reads the last of `out_indices` (MLA all); naive puts an auxiliary head on each of the others, PUP and MLA
    on every one. The MLA variants drop the class token before the first block, as their published weights were trained;
    keep the prefix tokens (`prefix_tokens="keep"`) for DINOv2, DINOv3, EVA-02 and CLIP. `patch_size`, `depth` and
    `embed_dim` change the architecture for training from nothing.
    """
    vit = plain_vit(
        backbone, image_size=image_size, out_indices=out_indices, weights=weights, prefix_tokens=prefix_tokens,
        position_mode="bilinear", drop_path=drop_path, checkpointing=checkpointing, patch_size=patch_size, depth=depth,
        embed_dim=embed_dim, in_channels=in_channels,
    )  # fmt: skip
    return decode(vit, [vit.dim] * len(vit.out_indices), decoder, num_classes=num_classes, width=width)


def setr_hlg(
    *,
    num_classes: int,
    backbone: str,
    decoder: Literal["hlg", "naive", "pup", "mla"] = "hlg",
    weights: str | None = None,
    width: int | None = None,
    dropout: float | None = None,
    drop_path: float = 0.1,
    dims: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    in_channels: int = 3,
) -> SETR:
    """An HLG transformer under its own decoder, or under one of SETR's; the named variants fix `backbone`.

    `width` defaults to 512 for the HLG decoder and 256 for SETR's. The HLG decoder alone has dropout, by default 0.1.
    `weights` is a local file in the official layout; `dims`, `heads` and `depths` change the architecture for training
    from nothing.
    """
    if decoder != "hlg" and dropout is not None:
        raise UserError(f"decoder {decoder} has no dropout; leave dropout out")
    network = hlg.hlg(
        backbone, weights=weights, drop_path=drop_path, in_channels=in_channels, dims=dims, heads=heads, depths=depths
    )
    if decoder != "hlg":
        return decode(network, network.dims, decoder, num_classes=num_classes, width=width or 256)
    rate = 0.1 if dropout is None else dropout
    aux = AuxHead(network.dims[2], num_classes=num_classes, width=256, dropout=rate)
    head = HLGHead(network.dims, width or 512, num_classes=num_classes, dropout=rate)
    return SETR(network, head, {2: aux})


# Depths of the official configurations; for MLA on 12 blocks, and for tiny and small, the same proportions.
setr_naive_vit_tiny = partial(setr, decoder="naive", backbone="vit_tiny_patch16_384", out_indices=(2, 5, 8, 11))
setr_naive_vit_small = partial(setr, decoder="naive", backbone="vit_small_patch16_384", out_indices=(2, 5, 8, 11))
setr_naive_vit_base = partial(setr, decoder="naive", backbone="vit_base_patch16_384", out_indices=(2, 5, 8, 11))
setr_naive_deit_base = partial(setr, decoder="naive", backbone="deit_base_patch16_384", out_indices=(2, 5, 8, 11))
setr_naive_vit_large = partial(setr, decoder="naive", backbone="vit_large_patch16_384", out_indices=(9, 14, 19, 23))
setr_pup_vit_tiny = partial(setr, decoder="pup", backbone="vit_tiny_patch16_384", out_indices=(4, 7, 9, 11))
setr_pup_vit_small = partial(setr, decoder="pup", backbone="vit_small_patch16_384", out_indices=(4, 7, 9, 11))
setr_pup_vit_base = partial(setr, decoder="pup", backbone="vit_base_patch16_384", out_indices=(4, 7, 9, 11))
setr_pup_deit_base = partial(setr, decoder="pup", backbone="deit_base_patch16_384", out_indices=(4, 7, 9, 11))
setr_pup_vit_large = partial(setr, decoder="pup", backbone="vit_large_patch16_384", out_indices=(9, 14, 19, 23))
setr_mla = partial(setr, decoder="mla", prefix_tokens="drop")
setr_mla_vit_tiny = partial(setr_mla, backbone="vit_tiny_patch16_384", out_indices=(2, 5, 8, 11))
setr_mla_vit_small = partial(setr_mla, backbone="vit_small_patch16_384", out_indices=(2, 5, 8, 11))
setr_mla_vit_base = partial(setr_mla, backbone="vit_base_patch16_384", out_indices=(2, 5, 8, 11))
setr_mla_deit_base = partial(setr_mla, backbone="deit_base_patch16_384", out_indices=(2, 5, 8, 11))
setr_mla_vit_large = partial(setr_mla, backbone="vit_large_patch16_384", out_indices=(5, 11, 17, 23))
setr_hlg_tiny = partial(setr_hlg, backbone="hlg_tiny")
setr_hlg_small = partial(setr_hlg, backbone="hlg_small")
setr_hlg_medium = partial(setr_hlg, backbone="hlg_medium")
setr_hlg_large = partial(setr_hlg, backbone="hlg_large")

UNUSED = r"^(decode_head|auxiliary_head\.\d+)\.conv_seg\."  # a layer that every official head inherits and none runs
OFFICIAL: Rules = (
    (r"^auxiliary_head\.(\d+)\.conv_1\.", r"aux_heads.\1.classify."),
    (r"^decode_head\.", "head."),
    (r"^auxiliary_head\.", "aux_heads."),
    (r"(head|aux_heads\.\d+)\.conv_(\d)\.", r"\1.convs.\2.0."),
    (r"(head|aux_heads\.\d+)\.syncbn_fc_(\d)\.", r"\1.convs.\2.1."),
)
MLA: Rules = (
    *((rf"^backbone\.norm_{i}\.", f"aggregation.norms.{i}.") for i in range(4)),
    *((rf"^backbone\.mla\.mla_p{i + 2}_1x1\.", f"aggregation.reduce.{i}.") for i in range(4)),
    *((rf"^backbone\.mla\.mla_p{i + 2}\.", f"aggregation.smooth.{i}.") for i in range(4)),
    # Two convolutions with their norms, numbered through (ReLU included): 0, 1 and 3, 4.
    *((rf"^decode_head\.mlahead\.head{i + 2}\.([01])\.", rf"head.branches.{i}.0.\1.") for i in range(4)),
    *((rf"^decode_head\.mlahead\.head{i + 2}\.3\.", f"head.branches.{i}.1.0.") for i in range(4)),
    *((rf"^decode_head\.mlahead\.head{i + 2}\.4\.", f"head.branches.{i}.1.1.") for i in range(4)),
    (r"^decode_head\.cls\.", "head.classify."),
    (r"^auxiliary_head\.(\d+)\.\w+\.weight$", r"aux_heads.\1.classify.weight"),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (fudan-zvg/SETR) into ours: naive, PUP and MLA.

    Raises UserError for HLG, whose official decoder was never published; `weights` takes its backbone.
    """
    if any(key.startswith("backbone.block1.") for key in state):
        raise UserError("the official HLG decoder is not known; give the file as weights, which takes its backbone")
    if any(key.startswith("backbone.mla.") for key in state):
        return rename(state, MLA, unused=UNUSED)
    last = 4 if "decode_head.conv_4.weight" in state else 1  # PUP or naive
    classify: Rules = ((rf"^decode_head\.conv_{last}\.", "head.classify."),)
    return rename(state, [*classify, *OFFICIAL], unused=UNUSED)
