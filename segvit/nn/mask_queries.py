"""Masks by dot product: a feature pyramid gives every pixel a vector, and each learned query another.

Source    B. Cheng, A. G. Schwing, A. Kirillov, "Per-Pixel Classification is Not All You Need for Semantic
          Segmentation" (MaskFormer), NeurIPS 2021, arXiv 2107.06278; its decoder is DETR's, without an encoder.
Checked   tests/golden/zsseg__{pixel_decoder,query_predictor} (MendelXu/zsseg.baseline).

Shapes    B images, Q queries, D decoder, M mask and E class channels, h w grid, N = h * w cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import Size, UserError
from segvit.nn.tokens import map_tokens

GROUPS = 32  # of every GroupNorm


class PixelDecoder(nn.Module):
    """Maps from fine to coarse -> one vector for each cell of the finest, (B, M, h, w)."""

    def __init__(self, dims: Sequence[int], dim: int, mask_dim: int) -> None:
        super().__init__()
        if dim % GROUPS:
            raise UserError(f"the pixel decoder has {dim} channels; give a multiple of {GROUPS}, its groups")
        self.lateral = nn.ModuleList(conv_norm(width, dim, 1) for width in dims[:-1])
        self.output = nn.ModuleList(conv_norm(width, dim, 3) for width in (*[dim] * (len(dims) - 1), dims[-1]))
        self.masks = nn.Conv2d(dim, mask_dim, 3, padding=1)
        init_convolutions(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = F.relu(self.output[-1](maps[-1]))
        for lateral, output, finer in reversed(list(zip(self.lateral, self.output, maps, strict=False))):
            x = F.relu(output(lateral(finer) + F.interpolate(x, size=finer.shape[-2:], mode="nearest")))
        return cast(Tensor, self.masks(x))


def conv_norm(channels: int, dim: int, kernel: int) -> nn.Sequential:
    """A convolution without bias and its GroupNorm."""
    convolution = nn.Conv2d(channels, dim, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, dim))


def init_convolutions(module: nn.Module) -> None:
    """Detectron2's "Xavier": uniform by the inputs alone, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """`layers` linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, *, layers: int) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return cast(Tensor, self.layers[-1](x))


class QueryLayer(nn.Module):
    """Post-norm: self attention, cross attention, ReLU MLP; positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, *, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = (
            nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True) for _ in range(2)
        )
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, *, positions: Tensor, places: Tensor) -> Tensor:
        """Queries (B, Q, D) with their `positions`, memory (B, N, D) with its `places` -> queries."""
        q = x + positions
        x = self.norm1(x + self.drop(self.self_attn(q, q, x, need_weights=False)[0]))
        update = self.cross_attn(x + positions, memory + places, memory, need_weights=False)[0]
        x = self.norm2(x + self.drop(update))
        return cast(Tensor, self.norm3(x + self.drop(self.fc2(self.drop(F.relu(self.fc1(x)))))))


class QueryDecoder(nn.Module):
    """Learned queries read the coarsest map; each becomes a class embedding and a mask over the pixels' vectors."""

    def __init__(
        self, in_dim: int, dim: int, *, queries: int, layers: int, heads: int, hidden: int, mask_dim: int,
        embed_dim: int, embed_hidden: int, embed_layers: int = 2, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim % heads or dim % 4:
            raise UserError(f"the decoder's dim {dim} is no multiple of 4 and of its {heads} heads; set either")
        stack = (QueryLayer(dim, heads=heads, hidden=hidden, dropout=dropout) for _ in range(layers))
        self.layers = nn.ModuleList(stack)
        for weight in self.layers.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.input_proj = nn.Conv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()
        init_convolutions(self.input_proj)
        self.class_embed = MLP(dim, embed_hidden, embed_dim, layers=embed_layers)
        self.mask_embed = MLP(dim, dim, mask_dim, layers=3)

    def forward(self, features: Tensor, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, C, h', w'), (B, M, h, w) -> embeddings (B, Q, E) and mask logits (B, Q, h, w) of every layer."""
        memory = map_tokens(self.input_proj(features))
        places = sine_places((features.shape[-2], features.shape[-1]), memory.shape[2]).to(memory)
        positions = self.queries.expand(memory.shape[0], -1, -1)
        x, outputs = torch.zeros_like(positions), list[tuple[Tensor, Tensor]]()
        for layer in self.layers:
            x = layer(x, memory, positions=positions, places=places)
            normed = self.norm(x)
            masks = torch.einsum("bqm,bmhw->bqhw", self.mask_embed(normed), pixels)
            # Masks are never in half precision.
            outputs.append((self.class_embed(normed), masks.to(torch.promote_types(masks.dtype, torch.float32))))
        return outputs


def sine_places(grid: Size, dim: int) -> Tensor:
    """DETR's fixed positions (h*w, D): row, then column, as sines and cosines in turns of D / 4 frequencies each.

    Rows and columns count from 1 and are scaled so that the last one is a full turn.
    """
    number = torch.arange(dim // 2)
    frequency = 10000.0 ** (2 * (number // 2) / (dim // 2))
    waves = []
    for count in grid:
        steps = torch.arange(1, count + 1, dtype=torch.float32)
        angles = (steps / (count + 1e-6) * (2 * math.pi))[:, None] / frequency
        waves.append(torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1))
    rows, columns = waves
    y, x = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)
