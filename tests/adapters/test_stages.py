"""Where stages end, and blocks in the place of others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segvit.adapters.stages import borrow, gaps_behind_stages, group_ends
from segvit.backbones.pvt import pvt
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import plain_vit
from segvit.contracts import UserError


@pytest.mark.parametrize(("depth", "last", "ends"), [
    (12, 11, [3, 6, 9, 12]), (12, 9, [3, 5, 8, 10]), (4, 3, [1, 2, 3, 4]), (6, 1, [1, 2]), (1, 0, [1]),
])  # fmt: skip
def test_groups_of_the_blocks_that_run(depth: int, last: int, ends: list[int]) -> None:
    with torch.device("meta"):
        vit = plain_vit("vit_tiny_patch16_224", image_size=32, depth=depth, out_indices=[last])
    assert group_ends(vit) == ends
    assert gaps_behind_stages(vit) == [(f"gaps.{end}", 192) for end in ends]


def test_gaps_of_pyramids() -> None:
    with torch.device("meta"):
        assert gaps_behind_stages(pyramid("resnet18")) == list(zip(
            ["gaps.1", "gaps.2", "gaps.3", "gaps.4"], [64, 128, 256, 512], strict=True
        ))  # fmt: skip
        assert gaps_behind_stages(pyramid("resnet18", out_indices=(-2, -1))) == [("gaps.1", 256), ("gaps.2", 512)]
        three = pvt("pvt_tiny", dims=(16, 32, 80, 64), depths=(1, 1, 1, 1))
    assert [dim for _, dim in gaps_behind_stages(three)] == [16, 32, 80, 64]
    with pytest.raises(UserError, match="no gaps between its stages"):
        gaps_behind_stages(nn.Linear(2, 2))


def test_borrowed_parts_are_the_same_ones() -> None:
    block, shell = nn.BatchNorm1d(3), nn.Module()
    outer = nn.Sequential(block)
    borrow(shell, outer)
    assert list(shell.state_dict()) == list(outer.state_dict())
    assert shell.get_submodule("0") is block
    plain = nn.Module()
    borrow(plain, block)
    plain.double()  # replaces buffers, which a copy of the dict would not see
    assert block.running_mean is not None
    assert block.running_mean.dtype == block.weight.dtype == torch.float64
