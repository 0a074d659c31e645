"""PVT v1: a four-stage pyramid transformer whose keys and values are read from a spatially reduced map.

Paper     W. Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
          ICCV 2021, arXiv 2102.12122. PVT v2 (arXiv 2106.13797) comes from timm, see `pyramid.py`.
Idea      Each stage cuts its map into patches (strides 4, 2, 2, 2) and attends to a map that a convolution has reduced
          8, 4, 2 and 1 times: high resolution without quadratic cost.
Differs   from the official code: position embeddings are resized whenever the grid's shape differs; the official test
          compares token counts with those of stage 1, and so stops at 448 and 896 pixels. `strict_positions` keeps
          its other effect, a stage 1 of equal count but other shape that takes the embedding as it is. Images below
          32 pixels a side are padded.
Checked   tests/golden/pvt__* (whai362/PVT classification/pvt.py, segmentation/pvt.py).

Shapes    B images, stage i with grid h w, N = h * w tokens, C channels, R spatial reduction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp
from timm.models import adapt_input_conv
from torch import Tensor, nn

from segvit.backbones.weights import read_state, unwrap
from segvit.contracts import Features, Size, UserError
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.tokens import Step, pad_beyond, patch_map

STRIDES = (4, 8, 16, 32)
DIMS, HEADS = (64, 128, 320, 512), (1, 2, 5, 8)
DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2), "pvt_small": (3, 4, 6, 3), "pvt_medium": (3, 4, 18, 3), "pvt_large": (3, 8, 27, 3),
}  # fmt: skip
LEAST = 32  # pixels a side: one token in the last stage, one reduced token in each


class ReducedAttention(nn.Module):
    """Spatial-reduction attention: queries from all tokens, keys and values from the map reduced R times."""

    def __init__(self, dim: int, *, heads: int, qkv_bias: bool, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the blocks' norms

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        source = x
        if self.reduction > 1:
            source = self.norm(self.sr(x.mT.unflatten(2, grid)).flatten(2).mT)
        key, value = self.kv(source).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (self.q(x), key, value))
        return self.proj(join_heads(F.scaled_dot_product_attention(query, key, value)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, *, heads: int, ratio: int, qkv_bias: bool, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReducedAttention(dim, heads=heads, qkv_bias=qkv_bias, reduction=reduction)
        self.mlp = Mlp(dim, ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches; what does not fill a patch is left out."""

    def __init__(self, inputs: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, dim, patch, patch), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        x = self.proj(x)
        return self.norm(x.flatten(2).mT), (x.shape[-2], x.shape[-1])


class PVT(nn.Module):
    """The dense backbone: the raw maps of the four stages, strides 4 to 32. The parts have the official names.

    Adapters put modules Step -> Step into `gaps`: gap i stands behind stage i, counted from 1.
    """

    def __init__(
        self, *, dims: Sequence[int], heads: Sequence[int], ratios: Sequence[int], depths: Sequence[int],
        reductions: Sequence[int] = (8, 4, 2, 1), image_size: int = 224, patch: int = 4, qkv_bias: bool = True,
        drop_path: float = 0.0, in_channels: int = 3, strict_positions: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dims, self.strict_positions = tuple(dims), strict_positions
        self.mean = IMAGENET_DEFAULT_MEAN if in_channels == 3 else (0.5,) * in_channels
        self.std = IMAGENET_DEFAULT_STD if in_channels == 3 else (0.5,) * in_channels
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        inputs, side = in_channels, image_size
        for stage, dim in enumerate(dims, start=1):
            cell = patch if stage == 1 else 2
            side //= cell
            self.add_module(f"patch_embed{stage}", PatchEmbed(inputs, dim, cell))
            slots = side**2 + (stage == 4)  # the class token's comes first
            self.register_parameter(f"pos_embed{stage}", nn.Parameter(torch.zeros(1, slots, dim)))
            blocks = [
                Block(dim, heads=heads[stage - 1], ratio=ratios[stage - 1], qkv_bias=qkv_bias,
                      reduction=reductions[stage - 1], drop_path=next(rates))
                for _ in range(depths[stage - 1])
            ]  # fmt: skip
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            inputs = dim
        self.gaps = nn.ModuleDict()
        self.apply(init)
        for stage in range(1, 5):
            nn.init.trunc_normal_(self.get_parameter(f"pos_embed{stage}"), std=0.02)

    def forward(self, images: Tensor) -> Features:
        x, covers, maps = *pad_to_least(images, LEAST), []
        extras: dict[str, Tensor] = {}
        for stage in range(1, 5):
            tokens, grid = self.embed(x, stage)
            positions = self.positions(stage, grid)
            step = Step(self.run(tokens + positions, grid, stage), 0, grid, grid, extras=extras)
            if str(stage) in self.gaps:
                step = self.gaps[str(stage)](step)
            x, extras = patch_map(step).contiguous(), step.extras
            maps.append(x)
        return Features(maps, list(STRIDES), (maps[0].shape[-2], maps[0].shape[-1]), covers, extras=extras)

    def embed(self, x: Tensor, stage: int) -> tuple[Tensor, Size]:
        """Tokens (B, N, C) and grid of a stage from the map before it."""
        tokens, grid = self.get_submodule(f"patch_embed{stage}")(x)
        return tokens, grid

    def run(self, tokens: Tensor, grid: Size, stage: int) -> Tensor:
        """The blocks of a stage."""
        for block in self.get_submodule(f"block{stage}").children():
            tokens = block(tokens, grid)
        return tokens

    def positions(self, stage: int, grid: Size) -> Tensor:
        """The position embedding of a stage for a grid (1, N, C), without the class token's."""
        slots = self.get_parameter(f"pos_embed{stage}")
        stored = slots[:, 1:] if stage == 4 else slots
        side = round(stored.shape[1] ** 0.5)
        same_count = self.strict_positions and stage == 1 and grid[0] * grid[1] == side**2
        known = all(isinstance(cells, int) for cells in grid)  # in a traced graph any size may come later
        if same_count or (known and grid == (side, side)):
            return stored
        square = stored.mT.unflatten(2, (side, side))
        return F.interpolate(square, size=grid, mode="bilinear", align_corners=False).flatten(2).mT


def pad_to_least(images: Tensor, least: int) -> tuple[Tensor, Size]:
    """Images of at least that many pixels a side, with zeros at the right and the bottom, and their size."""
    below, right = (torch.sym_max(0, least - side) for side in images.shape[-2:])  # of a traced size too
    padded = pad_beyond(images, below, right)
    return padded, (padded.shape[-2], padded.shape[-1])


class PVTClassifier(nn.Module):
    """The network that ImageNet weights were trained as: a class token joins in stage 4."""

    def __init__(self, trunk: PVT, num_classes: int) -> None:
        super().__init__()
        dim = trunk.dims[-1]
        self.trunk = trunk
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        init(self.head)

    def features(self, images: Tensor) -> Tensor:
        """The normalised class token (B, C)."""
        x = images
        for stage in range(1, 5):
            tokens, grid = self.trunk.embed(x, stage)
            if stage < 4:
                tokens = self.trunk.run(tokens + self.trunk.positions(stage, grid), grid, stage)
                x = tokens.mT.unflatten(2, grid)
        slots = torch.cat([self.trunk.get_parameter("pos_embed4")[:, :1], self.trunk.positions(4, grid)], 1)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1) + slots
        return self.norm(self.trunk.run(tokens, grid, 4))[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, K)."""
        return self.head(self.features(images))


def init(module: nn.Module) -> None:
    """Linear layers as the paper; convolutions keep the library's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pvt(
    name: str, *, weights: str | None = None, image_size: int = 224, drop_path: float = 0.1,
    depths: Sequence[int] | None = None, dims: Sequence[int] | None = None, in_channels: int = 3,
    strict_positions: bool = False,
) -> PVT:  # fmt: skip
    """PVT v1 by name: pvt_tiny, pvt_small, pvt_medium or pvt_large, the paper's table 1.

    `image_size` is that of the position embeddings. `weights` is a local official checkpoint (pvt_tiny.pth ...), of the
    classifier or of a dense model. `depths` and `dims` change the named architecture, for training from nothing.
    Raises UserError for an unknown name, and for sizes or weights that do not fit.
    """
    if name not in DEPTHS:
        raise UserError(f"there is no PVT {name!r}; choose from {', '.join(DEPTHS)}")
    depths, dims = depths or DEPTHS[name], dims or DIMS
    if not len(depths) == len(dims) == len(HEADS) or min(depths) < 1:
        raise UserError(f"depths {list(depths)} and dims {list(dims)} must have 4 values each, depths from 1")
    if any(dim % heads for dim, heads in zip(dims, HEADS, strict=True)):
        raise UserError(f"dims {list(dims)} must be multiples of the numbers of heads {list(HEADS)}")
    if image_size < LEAST:
        raise UserError(f"position embeddings are for images of {LEAST} pixels a side or more, not {image_size}")
    network = PVT(
        dims=dims, heads=HEADS, ratios=(8, 8, 4, 4), depths=depths, image_size=image_size,
        drop_path=drop_path, in_channels=in_channels, strict_positions=strict_positions,
    )  # fmt: skip
    if weights is not None:
        load_official(network, weights)
    return network


def load_official(network: PVT, weights: str) -> None:
    """Load an official checkpoint in place; the classifier's own parts are left out, embeddings are resized."""
    state = {
        key.removeprefix("backbone."): value for key, value in unwrap(read_state(Path(weights).expanduser())).items()
        if not re.match(r"(backbone\.)?(cls_token|norm\.|head\.)|(neck|decode_head)\.", key)
    }  # fmt: skip
    own = network.state_dict()
    for stage in range(1, 5):
        name = f"pos_embed{stage}"
        if name in state and state[name].shape[1] != own[name].shape[1]:
            first = int(stage == 4)
            old, new = (math.isqrt(value.shape[1] - first) for value in (state[name], own[name]))
            square = state[name][:, first:].mT.unflatten(2, (old, old))
            resized = F.interpolate(square, size=(new, new), mode="bilinear", align_corners=False).flatten(2).mT
            state[name] = torch.cat([state[name][:, :first], resized], 1)
    kernel = "patch_embed1.proj.weight"
    if kernel in state and state[kernel].shape[1] == 3:
        state[kernel] = adapt_input_conv(own[kernel].shape[1], state[kernel])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights} does not fit this PVT ({reason}); choose the matching size") from error
