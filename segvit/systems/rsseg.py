"""RSSeg: a pathway of local differences beside a transformer, a learned separation, and discriminative cross attention.

Paper     Y. Hong, H. Pan, W. Sun, X. Yu, H. Gao, "Representation Separation for Semantic Segmentation with Vision
          Transformers", arXiv 2212.13764. Only its abstract was at hand; no code and no weights were published.
Idea      A transformer's tokens become too alike. They are set apart again patch by patch and region by region.
Found     in the abstract: a decoupled network of two pathways, of which the second enhances the local discrepancy of
          patches and passes it down beside the global representations; a spatially adaptive separation module; a
          discriminative cross attention that learns regions by auxiliary supervision; plain and pyramid backbones.
Proposed  here, for want of the paper's formulas: everything below. Discrepancy is a map minus its 3 x 3 mean;
          separation adds the gated difference from a weighted local mean; one query a class attends to the separated
          map, and its region is classified and its attention compared with the class's mask in every layer; the last
          queries become the kernels that classify pixels. Losses and weights follow SegViT.
Checked   by behaviour, tests/systems/test_rsseg.py: a result of this network is no reproduction of the paper. With
          BEiT-L and 150 classes it has 325 M parameters, the published model 330 M.

Shapes    B images, K classes (= queries), h w grid, N = h * w cells, D backbone, C decoder channels, M heads,
          P present (image, class) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.backbones.vit import PlainViT, plain_vit
from segvit.contracts import Dense, Features, Readout, Size, UserError
from segvit.losses.binary import focal_and_dice
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.masks import present_classes
from segvit.losses.pixel import pixel_losses
from segvit.nn.attention import Attention, init_packed, join_heads, split_heads
from segvit.nn.readout import logit_rows
from segvit.nn.tokens import map_tokens


def discrepancy(x: Tensor) -> Tensor:
    """What sets each cell apart from its 3 x 3 neighbourhood; 0 on a constant map, also at the border."""
    return x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, where the size differs at all."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def project(in_dim: int, dim: int) -> nn.Sequential:
    """LayerNorm and a 1 x 1 convolution."""
    return nn.Sequential(LayerNorm2d(in_dim, eps=1e-6), nn.Conv2d(in_dim, dim, 1))


class Refinement(nn.Module):
    """Residual block of the local pathway: a depthwise 3 x 3 convolution between two 1 x 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        spread = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.body = nn.Sequential(
            LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, dim, 1), spread, nn.GELU(), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class LocalPathway(nn.Module):
    """Discrepancies of the backbone's maps, passed down from shallow to deep and never back into the backbone."""

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(project(width, dim) for width in dims)
        self.refine = nn.ModuleList(nn.Sequential(Refinement(dim), Refinement(dim)) for _ in dims[1:])

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        first, *deeper = [resize(enter(discrepancy(m)), size) for enter, m in zip(self.enter, maps, strict=True)]
        for refine, x in zip(self.refine, deeper, strict=True):
            first = refine(first + x)
        return first


class AdaptiveSeparation(nn.Module):
    """Cells move away from a mean of their neighbours whose weights each cell chooses: a learned high pass."""

    def __init__(self, dim: int, *, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weigh = nn.Sequential(
            nn.Conv2d(dim, dim // 4, 3, padding=1), nn.GELU(), nn.Conv2d(dim // 4, kernel * kernel, 1)
        )
        self.gate = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.gate.weight)  # every gate starts half open
        nn.init.zeros_(self.gate.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x).sigmoid() * (x - self.local_mean(x))

    def local_mean(self, x: Tensor) -> Tensor:
        """The weighted mean of each cell's neighbours inside the map."""
        (height, width), k = x.shape[-2:], self.kernel
        inside = F.unfold(torch.ones_like(x[:1, :1]), k, padding=k // 2).unflatten(2, (height, width))  # (1, k*k, h, w)
        weights = self.weigh(x).masked_fill(inside == 0, float("-inf")).softmax(1)  # (B, k*k, h, w)
        padded = F.pad(x, (k // 2,) * 4)
        # Neighbour by neighbour: gathered at once they would be k * k maps.
        mean = torch.zeros_like(x)
        for place in range(k * k):
            top, left = divmod(place, k)
            mean = mean + weights[:, place : place + 1] * padded[:, :, top : top + height, left : left + width]
        return mean


class DiscriminativeLayer(nn.Module):
    """Queries read their regions, then each other. Post-norm, as SegViT's decoder."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.self_attn = Attention(dim, heads=heads, dropout=dropout)
        self.mlp = Mlp(dim, 4 * dim, drop=dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, K, C), (B, N, C) -> queries, regions (B, K, C) and, in training, attention logits (B, K, N)."""
        q, k, v = (split_heads(t, self.heads) for t in (self.q(queries), self.k(memory), self.v(memory)))
        masks: Tensor | None = None
        if self.training:
            scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, M, K, N)
            masks, mixed = scores.mean(1), scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        regions = self.proj(join_heads(mixed))
        queries = self.norm1(queries + self.drop(regions))
        queries = self.norm2(queries + self.drop(self.self_attn(queries)))
        return self.norm3(queries + self.drop(self.mlp(queries))), regions, masks


class RSSegHead(nn.Module):
    """Both pathways joined and separated, the queries over them, and the classification of pixels."""

    def __init__(
        self, dims: Sequence[int], dim: int, *, num_classes: int, layers: int, heads: int, kernel: int, dropout: float
    ) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise UserError(
                f"the decoder's dim {dim} must be a multiple of 4 and of its heads {heads}; set dim or heads"
            )
        if kernel < 3 or kernel % 2 == 0:
            raise UserError(
                f"separation looks at an odd number of cells from 3 on, not {kernel}; set kernel to 3, 5 or 7"
            )
        self.local, self.globally = LocalPathway(dims, dim), project(dims[-1], dim)
        self.separation, self.norm = AdaptiveSeparation(dim, kernel=kernel), nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(num_classes, dim))
        self.layers = nn.ModuleList(DiscriminativeLayer(dim, heads=heads, dropout=dropout) for _ in range(layers))
        self.region_embed = nn.Linear(dim, num_classes + 1)  # the classes and "absent"
        self.kernels, self.pixel_embed = nn.Linear(dim, dim), nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention):
                init_packed(module)

    def forward(self, maps: Sequence[Tensor], size: Size) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K, *size); in training also `aux` and, for layer i, `regions{i}` (B, K, K+1) and `masks{i}`."""
        joined = resize(self.globally(maps[-1]), size) + self.local(maps, size)
        memory = self.norm(map_tokens(self.separation(joined)))  # (B, N, C)
        queries = self.queries.expand(memory.shape[0], -1, -1)
        extras: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            queries, regions, masks = layer(queries, memory)
            if masks is not None:
                extras |= {f"regions{i}": self.region_embed(regions), f"masks{i}": masks.unflatten(2, size)}
        if self.training:
            extras["aux"] = self.pixel_embed(memory).mT.unflatten(2, size)
        scores = self.kernels(queries) @ memory.mT * memory.shape[-1] ** -0.5  # (B, K, N)
        return scores.unflatten(2, size), extras


class RSSeg(nn.Module):
    """A backbone and the head, which works on the grid of the backbone's map `level`."""

    def __init__(self, backbone: PlainViT | Pyramid, head: RSSegHead, *, level: int) -> None:
        super().__init__()
        self.backbone, self.head, self.level = backbone, head, level

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        size = (features.maps[self.level].shape[-2], features.maps[self.level].shape[-1])
        logits, extras = self.head(features.maps, size)
        return Dense(logits, features.extras | extras, features.covers)


READOUT = Readout(logit_rows)


def normalisers(masks: Tensor, *, num_classes: int, ignore_index: int) -> dict[str, Tensor]:
    """`pixel_counts`, and the number of `present` (image, class) pairs."""
    present = present_classes(masks, num_classes=num_classes, ignore_index=ignore_index)
    return pixel_counts(masks, num_classes=num_classes, ignore_index=ignore_index) | {"present": present.sum()}


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 1.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 0.0, gamma: float = 2.0, ohem_threshold: float = 0.7,
    ohem_min_kept: int = 100_000, aux_weight: float = 0.4, region_weight: float = 1.0, mask_focal: float = 20.0,
    mask_dice: float = 1.0, absent: float = 0.1,
) -> dict[str, Tensor]:  # fmt: skip
    """Losses of the pixels, times `aux_weight` those of the plain classifier, and the supervision of every layer.

    A region is classified as its class where that is present, else as absent, with the weight `absent`; the attention
    of present classes is compared with their masks. `class_weights` act on each pixel and each present class.
    """
    losses: dict[str, Tensor] = {}
    parts = {"loss_": (out.logits, 1.0)}
    if "aux" in out.extras and aux_weight:
        parts["loss_aux_"] = (out.extras["aux"], aux_weight)
    for prefix, (logits, weight) in parts.items():
        terms = pixel_losses(
            logits_at(out._replace(logits=logits), masks), masks, totals, ignore_index=ignore_index,
            class_weights=class_weights, cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem,
            gamma=gamma, ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
        )  # fmt: skip
        losses |= {name.replace("loss_", prefix): weight * value for name, value in terms.items()}
    found = region_losses(out, masks, totals, ignore_index=ignore_index, class_weights=class_weights, absent=absent)
    factors = {"loss_region": region_weight, "loss_mask_focal": mask_focal, "loss_mask_dice": mask_dice}
    return losses | {name: factors[name.rpartition("_")[0]] * value for name, value in found.items()}


def region_losses(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int, class_weights: Tensor | None,
    absent: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Unweighted `loss_region_i`, `loss_mask_focal_i` and `loss_mask_dice_i` of every layer i that is in the extras."""
    count = out.logits.shape[1]
    dtype = torch.promote_types(out.logits.dtype, torch.float32)  # losses never in half precision
    present = present_classes(masks, num_classes=count, ignore_index=ignore_index)  # (B, K)
    pairs = present.nonzero()  # (P, 2)
    labels = torch.where(present, torch.arange(count, device=masks.device), count)
    balance = torch.ones(count, device=masks.device) if class_weights is None else class_weights
    weights, pair_weights = torch.where(present, balance, absent).to(dtype), balance[pairs[:, 1]].to(dtype)
    pairs_total = totals["present"].to(dtype)
    region_total = pairs_total + absent * (totals["images"] * count - pairs_total)
    losses: dict[str, Tensor] = {}
    for i in range(sum(name.startswith("regions") for name in out.extras)):
        entropy = F.cross_entropy(out.extras[f"regions{i}"].to(dtype).mT, labels, reduction="none")
        chosen = out.extras[f"masks{i}"][pairs[:, 0], pairs[:, 1]].to(dtype)
        focal, dice = focal_and_dice(chosen, masks, pairs, covers=out.covers)
        losses[f"loss_region_{i}"] = (weights * entropy).sum() / region_total
        losses[f"loss_mask_focal_{i}"] = (pair_weights * focal).sum() / pairs_total.clamp(min=1)
        losses[f"loss_mask_dice_{i}"] = (pair_weights * dice).sum() / pairs_total.clamp(min=1)
    return losses


def rsseg(
    *,
    num_classes: int,
    backbone: str,
    weights: str | None = None,
    image_size: int | Size = 512,
    out_indices: Sequence[int],
    dim: int | None = None,
    heads: int = 8,
    layers: int = 3,
    kernel: int = 3,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    prefix_tokens: Literal["keep", "drop"] = "keep",
    checkpointing: bool = False,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> RSSeg:
    """RSSeg on any plain ViT of timm; the named variants fix `backbone` and `out_indices`, the quarters of its depth.

    `dim`, `heads` and `layers` are the decoder's; `dim` defaults to half the backbone's width. `kernel` is the side of
    the neighbourhood that separation looks at. `patch_size`, `depth` and `embed_dim` change the architecture for
    training from nothing.
    """
    vit = plain_vit(
        backbone, image_size=image_size, out_indices=out_indices, weights=weights, prefix_tokens=prefix_tokens,
        drop_path=drop_path, checkpointing=checkpointing, patch_size=patch_size, depth=depth, embed_dim=embed_dim,
        in_channels=in_channels,
    )  # fmt: skip
    head = RSSegHead(
        [vit.dim] * len(vit.out_indices), dim or vit.dim // 2, num_classes=num_classes, layers=layers, heads=heads,
        kernel=kernel, dropout=dropout,
    )  # fmt: skip
    return RSSeg(vit, head, level=0)


def rsseg_pyramid(
    *,
    num_classes: int,
    backbone: str = "swin_tiny_patch4_window7_224",
    weights: str | None = None,
    dim: int = 256,
    heads: int = 8,
    layers: int = 3,
    kernel: int = 3,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    in_channels: int = 3,
) -> RSSeg:
    """RSSeg on any pyramid of timm, with the local pathway on its second map, at stride 8. Keywords as in `rsseg`."""
    trunk = pyramid(backbone, weights=weights, drop_path=drop_path, in_channels=in_channels)
    head = RSSegHead(
        trunk.dims, dim, num_classes=num_classes, layers=layers, heads=heads, kernel=kernel, dropout=dropout
    )
    return RSSeg(trunk, head, level=1)


rsseg_vit_tiny = partial(rsseg, backbone="vit_tiny_patch16_384", out_indices=(2, 5, 8, 11))
rsseg_vit_small = partial(rsseg, backbone="vit_small_patch16_384", out_indices=(2, 5, 8, 11))
rsseg_vit_base = partial(rsseg, backbone="vit_base_patch16_384", out_indices=(2, 5, 8, 11))
rsseg_vit_large = partial(rsseg, backbone="vit_large_patch16_384", out_indices=(5, 11, 17, 23))
rsseg_beit_large = partial(rsseg, backbone="beit_large_patch16_384", out_indices=(5, 11, 17, 23))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raises UserError: there are no official checkpoints."""
    raise UserError(f"no weights of RSSeg were published, so this file of {len(state)} tensors is of another model")
