"""Neck and head of feature pyramid networks beyond the goldens: odd maps, any number of levels, official names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.nn.fpn import FPN, FPN_RULES, FPNHead
from segvit.nn.rename import rename


@torch.no_grad()
def test_levels_are_added_from_coarse_to_fine(seeded: torch.Generator) -> None:
    fpn = FPN((4, 6, 8), 5)
    maps = [torch.randn(2, 4, 9, 13), torch.randn(2, 6, 4, 6), torch.randn(2, 8, 2, 3)]  # floors of odd sides
    fine, middle, coarse = (lateral(x) for lateral, x in zip(fpn.lateral, maps, strict=True))
    middle = middle + F.interpolate(coarse, size=(4, 6), mode="nearest")
    fine = fine + F.interpolate(middle, size=(9, 13), mode="nearest")
    expected = [output(x) for output, x in zip(fpn.output, (fine, middle, coarse), strict=True)]
    found = fpn(maps)
    assert [x.shape for x in found] == [(2, 5, 9, 13), (2, 5, 4, 6), (2, 5, 2, 3)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_level_is_two_convolutions(seeded: torch.Generator) -> None:
    fpn, x = FPN((4,), 5), torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(fpn([x])[0], fpn.output[0](fpn.lateral[0](x)))


@torch.no_grad()
def test_levels_are_doubled_in_steps(seeded: torch.Generator) -> None:
    head = FPNHead(8, 6, strides=(4, 8, 16), num_classes=4).eval()
    assert [len(scale) for scale in head.scales] == [3, 4, 8]
    levels = [torch.randn(1, 8, 10, 14), torch.randn(1, 8, 5, 7), torch.randn(1, 8, 2, 3)]  # 4 times 2 misses 10 by 2
    conv, norm, act = head.scales[0]
    total = act(norm(conv(levels[0]))) + head.scales[1](levels[1])
    last = head.scales[2](levels[2])
    assert last.shape[-2:] == (8, 12)
    total = total + F.interpolate(last, size=(10, 14), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(levels), head.classify(total))


def test_initialisation() -> None:
    torch.manual_seed(0)
    fpn = FPN((64,), 64)
    for conv, fan in ((fpn.lateral[0], 64 + 64), (fpn.output[0], 9 * (64 + 64))):
        assert conv.weight.abs().max() <= (6 / fan) ** 0.5
        assert conv.weight.std().item() > 0.9 * (2 / fan) ** 0.5
        assert conv.bias.abs().max() == 0


def test_official_names() -> None:
    fpn = FPN((4, 6), 5)
    state: dict[str, Tensor] = {f"fpn.{key}": value for key, value in fpn.state_dict().items()}
    theirs = {}
    for key, value in state.items():
        _, part, level, kind = key.split(".")
        theirs[f"neck.{'lateral_convs' if part == 'lateral' else 'fpn_convs'}.{level}.conv.{kind}"] = value
    assert "neck.fpn_convs.1.conv.bias" in theirs
    assert rename(theirs, FPN_RULES, unused=r"(?!)").keys() == state.keys()
