"""PGT beyond the goldens: published counts, groups by hand, any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.backbones.pgt import PGT, GroupAttention, pgt
from segvit.contracts import UserError
from segvit.nn.flops import count_parameters
from tests.counting import gmacs

TINY: dict[str, Any] = {"depths": (1, 1, 2, 1), "embed_dim": 32}


def build(**options: Any) -> PGT:
    torch.manual_seed(0)
    return pgt("pgt_tiny", **(TINY | options)).eval()


# Parameters with the norms of three outputs, multiply-adds at 224 and 512, measured on the authors' pull request.
PUBLISHED = {
    "pgt_tiny": (12.265, 2.127, 15.128),
    "pgt_small": (27.540, 4.635, 30.241),
    "pgt_base": (48.880, 9.159, 61.690),
    "pgt_large": (86.800, 15.989, 101.984),
}
HEAVY = ("pgt_base", "pgt_large")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else []) for n in PUBLISHED])
def test_published_counts(name: str) -> None:
    with torch.device("meta"):
        network = pgt(name)
    parameters, small, large = PUBLISHED[name]
    assert count_parameters(network) / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert gmacs(network, (224, 224)) == pytest.approx(small, abs=1e-3)
    assert gmacs(network, (512, 512)) == pytest.approx(large, abs=1e-3)


def by_hand(attention: GroupAttention, x: Tensor, grid: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Rectangle by rectangle, with a bias where padding stands."""
    g, heads = attention.side, attention.heads
    whole = F.pad(x.mT.unflatten(2, grid), (0, padded[1] - grid[1], 0, padded[0] - grid[0]))  # (1, C, H, W)
    mixed = torch.zeros_like(whole)
    rows, columns = padded[0] // g, padded[1] // g
    for top in range(0, padded[0], rows):
        for left in range(0, padded[1], columns):
            place = (..., slice(top, top + rows), slice(left, left + columns))
            cells = whole[place].flatten(2).mT[0]  # (n, C)
            key, value = attention.kv(cells).chunk(2, dim=-1)
            parts = []
            for q, k, v in zip(*(part.chunk(heads, 1) for part in (attention.q(cells), key, value)), strict=True):
                parts.append((q @ k.mT / q.shape[1] ** 0.5).softmax(-1) @ v)
            mixed[place] = torch.cat(parts, 1).mT.unflatten(1, (rows, columns))
    return attention.proj(mixed[..., : grid[0], : grid[1]].flatten(2).mT)


@pytest.mark.parametrize(
    ("groups", "grid", "padded"),
    [
        (4, (4, 6), (4, 6)),
        (1, (3, 5), (3, 5)),
        (16, (9, 10), (12, 12)),
        (16, (8, 10), (12, 12)),  # the authors' rule: 8 divides, and yet it gets a whole group more
    ],
)
@torch.no_grad()
def test_groups(groups: int, grid: tuple[int, int], padded: tuple[int, int], seeded: torch.Generator) -> None:
    attention = GroupAttention(16, heads=2, groups=groups)
    x = torch.randn(1, grid[0] * grid[1], 16)
    torch.testing.assert_close(attention(x, grid), by_hand(attention, x, grid, padded), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (224, 160), (65, 127), (70, 33), (1, 1)])
@torch.no_grad()
def test_any_size(size: tuple[int, int], seeded: torch.Generator) -> None:
    features = build()(torch.randn(2, 3, *size))
    height, width = (max(side, 64) for side in size)
    assert (features.covers, features.strides) == ((height, width), [8, 16, 32])
    assert features.grid == (height // 8, width // 8)
    for x, stride, dim in zip(features.maps, features.strides, (64, 128, 256), strict=True):
        assert x.shape == (2, dim, height // stride, width // stride)
        assert torch.isfinite(x).all()


@torch.no_grad()
def test_norms_are_for_the_outputs_alone(seeded: torch.Generator) -> None:
    network, images = build(), torch.randn(1, 3, 64, 64)
    before = network(images).maps
    network.norms["1"].weight.mul_(3)
    after = network(images).maps
    torch.testing.assert_close(after[0], 3 * before[0])
    assert torch.equal(after[1], before[1])
    assert not hasattr(network.norms, "0")


def test_stochastic_depth_rises_to_the_last_block() -> None:
    network = build(drop_path=0.2)
    rates = [block.drop_path.drop_prob for stage in network.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pgt_huge"}, "no PGT 'pgt_huge'; choose from pgt_tiny"),
        ({"embed_dim": 48}, "embed_dim 48 must be a multiple of 32"),
        ({"depths": (1, 1, 1)}, "4 values from 1"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pgt(**({"name": "pgt_tiny"} | TINY | options))
