"""Multi-head attention with packed projections, as torch.nn.MultiheadAttention has them, through the fused kernel.

Shapes    B images, Q queries, N memory tokens, D channels, M heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, M, N, D/M)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, M, N, D/M) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention of queries over themselves or over a memory; projections q, k, v packed in `qkv` in that order."""

    def __init__(self, dim: int, *, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is None:
            q, k, v = self.qkv(queries).chunk(3, dim=-1)
        else:
            dim = queries.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(queries, weight[:dim], bias[:dim])  # (B, Q, D)
            k, v = F.linear(memory, weight[dim:], bias[dim:]).chunk(2, dim=-1)  # (B, N, D) x 2
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)))


def init_packed(attention: Attention) -> None:
    """torch.nn.MultiheadAttention's initialisation of the packed projections."""
    nn.init.xavier_uniform_(attention.qkv.weight)
    with torch.no_grad():
        attention.qkv.bias.zero_()
