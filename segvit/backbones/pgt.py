"""PGT: a pyramid whose attention stays inside spatial groups, fewer and larger ones in deeper stages.

Paper     S. Wu, T. Wu, F. Lin, S. Tian, G. Guo, "Fully Transformer Networks for Semantic Image Segmentation", arXiv
          2106.04108: the encoder of FTN (`systems/ftn.py`).
Idea      The number of groups is fixed (64, 16, 1, 1), so the group grows with the image; positions come from a
          depthwise convolution after each block.
Differs   from the authors' code: images below 64 pixels a side are padded. Its padding of maps that do not divide into
          groups is kept: as soon as one axis needs rows, the other gets a whole group's worth if it divides.
Checked   tests/golden/ftn__pgt* (open-mmlab/mmsegmentation pull request 1489, pgt.py).

Shapes    B images, stage i with grid h w, N = h * w tokens, C channels, G = g * g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from segvit.backbones.pvt import PatchEmbed, init, pad_to_least
from segvit.contracts import Features, Size, UserError
from segvit.nn.attention import join_heads, split_heads

GROUPS = (64, 16, 1, 1)
STRIDES = (4, 8, 16, 32)
LEAST = 64  # pixels a side: two tokens in the last stage, which FTN's decoder halves again


class GroupAttention(nn.Module):
    """Multi-head attention inside each of `groups` equal rectangles of the map."""

    def __init__(self, dim: int, *, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.side = heads, round(groups**0.5)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        g = self.side
        # The authors' rule: both axes grow as soon as one of them does not divide. Padding takes part in the softmax.
        grow = torch.sym_min(1, grid[0] % g + grid[1] % g)  # 0 or 1; no condition, so that sizes may be traced
        padded = (grid[0] + grow * (g - grid[0] % g), grid[1] + grow * (g - grid[1] % g))
        rows, columns = padded[0] // g, padded[1] // g
        tokens = F.pad(x.unflatten(1, grid), (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        cut = tokens.unflatten(2, (g, columns)).unflatten(1, (g, rows))  # (B, g, rows, g, columns, C)
        grouped = cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B * G, rows * columns, C)
        key, value = self.kv(grouped).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (self.q(grouped), key, value))
        mixed = join_heads(F.scaled_dot_product_attention(query, key, value))
        whole = mixed.unflatten(1, (rows, columns)).unflatten(0, (-1, g, g)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.proj(whole[:, : grid[0], : grid[1]].flatten(1, 2))


class Block(nn.Module):
    """Pre-norm block followed by the conditional position encoding, a depthwise convolution of the map."""

    def __init__(self, dim: int, *, heads: int, ratio: int, groups: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, heads=heads, groups=groups)
        self.mlp = Mlp(dim, ratio * dim)
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x + self.cpe(x.mT.unflatten(2, grid)).flatten(2).mT


class Stage(nn.Module):
    """Patches, then blocks."""

    def __init__(
        self, inputs: int, dim: int, *, patch: int, heads: int, ratio: int, groups: int, rates: Sequence[float]
    ) -> None:
        super().__init__()
        self.transform = PatchEmbed(inputs, dim, patch)
        self.blocks = nn.ModuleList(
            Block(dim, heads=heads, ratio=ratio, groups=groups, drop_path=rate) for rate in rates
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        tokens, grid = self.transform(x)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return tokens, grid


class PGT(nn.Module):
    """The maps of the stages in `out_indices`, normalised; each stage reads the one before as it is."""

    def __init__(
        self, *, dim: int, depths: Sequence[int], heads: Sequence[int], groups: Sequence[int] = GROUPS, ratio: int = 4,
        patch: int = 4, out_indices: Sequence[int] = (1, 2, 3), drop_path: float = 0.0, in_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_indices = tuple(out_indices)
        self.mean = IMAGENET_DEFAULT_MEAN if in_channels == 3 else (0.5,) * in_channels
        self.std = IMAGENET_DEFAULT_STD if in_channels == 3 else (0.5,) * in_channels
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        widths = [in_channels, *(dim << i for i in range(len(depths)))]
        self.stages = nn.ModuleList(
            Stage(widths[i], widths[i + 1], patch=patch if i == 0 else 2, heads=heads[i], ratio=ratio,
                  groups=groups[i], rates=rates[i].tolist())
            for i in range(len(depths))
        )  # fmt: skip
        self.dims = tuple(widths[i + 1] for i in self.out_indices)
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(widths[i + 1]) for i in self.out_indices})
        self.apply(init)

    def forward(self, images: Tensor) -> Features:
        x, covers, maps = *pad_to_least(images, LEAST), []
        for i, stage in enumerate(self.stages):
            tokens, grid = stage(x)
            x = tokens.mT.unflatten(2, grid)
            if i in self.out_indices:
                maps.append(self.norms[str(i)](tokens).mT.unflatten(2, grid))
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        return Features(maps, [STRIDES[i] for i in self.out_indices], grid, covers)


VARIANTS = {  # channels of the first stage, blocks of each
    "pgt_tiny": (64, (2, 2, 6, 2)),
    "pgt_small": (96, (2, 2, 6, 2)),
    "pgt_base": (96, (2, 2, 18, 2)),
    "pgt_large": (128, (2, 2, 18, 2)),
}


def pgt(
    name: str, *, drop_path: float = 0.0, depths: Sequence[int] | None = None, embed_dim: int | None = None,
    in_channels: int = 3,
) -> PGT:  # fmt: skip
    """PGT by name, for FTN: pgt_tiny, pgt_small, pgt_base or pgt_large.

    Stages double their channels, of which each head has 32. `depths` and `embed_dim`, that of the first stage, change
    the named architecture. Raises UserError for an unknown name and for sizes that do not fit.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no PGT {name!r}; choose from {', '.join(VARIANTS)}")
    embed_dim, depths = embed_dim or VARIANTS[name][0], depths or VARIANTS[name][1]
    if embed_dim < 32 or embed_dim % 32 or len(depths) != len(STRIDES) or min(depths) < 1:
        raise UserError(f"embed_dim {embed_dim} must be a multiple of 32, and depths {list(depths)} 4 values from 1")
    heads = [(embed_dim // 32) << i for i in range(len(depths))]
    return PGT(dim=embed_dim, depths=depths, heads=heads, drop_path=drop_path, in_channels=in_channels)
