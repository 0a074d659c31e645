"""Semantic FPN's parts: the neck of feature pyramid networks, and the head that adds its levels and classifies.

Neck      lateral 1x1 convolutions, a top-down sum, 3x3 convolutions; `Levels` make its maps of a ViT's.
Head      A. Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446.

Shapes    B images, K classes, level i from fine to coarse, with C_i channels before and D after the neck.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from segvit.nn.rename import Rules


class Levels(nn.Module):
    """Maps of one stride, such as a ViT's, at four times, twice, once and half their resolution.

    `places` says which of the maps each level is made from. Maps of stride 8 (`fine`) are made twice as coarse: twice,
    once, half and a quarter, so that the levels have the strides 4 to 32 in both cases. That is our reading: the card
    and the stored cases have stride 16 only.
    """

    def __init__(self, dim: int, places: Sequence[int], *, fine: bool = False) -> None:
        super().__init__()
        self.places, self.same = tuple(places), 1 if fine else 2  # `same`: the level as it comes
        double = partial(nn.ConvTranspose2d, dim, dim, 2, stride=2)
        tails: list[list[nn.Module]] = [[double(), nn.BatchNorm2d(dim), nn.GELU(), double()], [double()], [], []]
        tails = [tails[1], [], [], []] if fine else tails
        self.layers = nn.ModuleList(nn.Sequential(nn.GroupNorm(1, dim), *tail) for tail in tails)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [layer(maps[place]) for layer, place in zip(self.layers, self.places, strict=True)]
        height, width = levels[-1].shape[-2:]
        for level in range(self.same + 1, 4):
            side = 2 ** (level - self.same)
            levels[level] = F.max_pool2d(levels[level], (min(height, side), min(width, side)), stride=side)
        return levels  # of a map smaller than a window, one cell stays


class FPN(nn.Module):
    """Maps of any widths -> as many maps of `dim` channels, each with the coarser ones added (nearest upsampling)."""

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in dims)
        self.output = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in dims)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.get_parameter("bias"), 0.0)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")
        return [output(x) for output, x in zip(self.output, levels, strict=True)]


class ScaleHead(nn.Sequential):
    """3x3 convolutions with BatchNorm and ReLU, each followed by a doubling, from a stride down to the finest one."""

    def __init__(self, inputs: int, dim: int, doublings: int) -> None:
        parts: list[nn.Module] = []
        for i in range(max(1, doublings)):
            width = inputs if i == 0 else dim
            parts += [nn.Conv2d(width, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
            if doublings:
                parts.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        super().__init__(*parts)


class FPNHead(nn.Module):
    """The levels of an FPN -> logits (B, K, h, w) at the finest of their strides."""

    def __init__(
        self, inputs: int, dim: int, *, strides: Sequence[int], num_classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        doublings = [(stride // strides[0]).bit_length() - 1 for stride in strides]
        self.scales = nn.ModuleList(ScaleHead(inputs, dim, count) for count in doublings)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.constant_(self.classify.get_parameter("bias"), 0.0)

    def forward(self, levels: list[Tensor]) -> Tensor:
        total = self.scales[0](levels[0])
        for scale, level in zip(self.scales[1:], levels[1:], strict=True):
            total = total + F.interpolate(scale(level), size=total.shape[-2:], mode="bilinear", align_corners=False)
        return self.classify(self.drop(total))


FPN_RULES: Rules = (  # mmsegmentation's names
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"fpn.lateral.\1."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"fpn.output.\1."),
)
HEAD_RULES: Rules = (  # pairs of a convolution block and a doubling there are four modules here
    *((rf"^decode_head\.scale_heads\.(\d)\.{i}\.conv\.", rf"head.scales.\1.{2 * i}.") for i in (0, 2, 4)),
    *((rf"^decode_head\.scale_heads\.(\d)\.{i}\.bn\.", rf"head.scales.\1.{2 * i + 1}.") for i in (0, 2, 4)),
    (r"^decode_head\.conv_seg\.", "head.classify."),
)
