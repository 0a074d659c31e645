"""The neck of feature pyramid networks: lateral 1x1 convolutions, a top-down sum, 3x3 convolutions.

Shapes    level i from fine to coarse, with C_i channels before and D after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from segvit.nn.rename import Rules


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


FPN_RULES: Rules = (  # mmsegmentation's names
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"fpn.lateral.\1."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"fpn.output.\1."),
)
