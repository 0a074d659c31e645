"""DuAT: a decoder that reads each deep map by a local and a global branch, and sharpens outlines with the finest one.

Paper     F. Tang, Z. Xu, Q. Huang, J. Wang, X. Hou, J. Su, J. Liu, "DuAT: Dual-Aggregation Transformer Network for
          Medical Image Segmentation", PRCV 2023, arXiv 2212.11677.
Idea      GLSA splits the channels of a map: one half is attended to locally, the other globally. SBA lets the deep map
          and the stride-4 map fill in what the other is unsure of. Both paths are supervised; their logits are summed.
Differs   from the paper: the global branch multiplies by a sigmoid, as the released code does, where the figure adds.
          From the code: layers that it never uses are left out; images are padded to whole cells and the scores
          cropped. Two classes are the paper's one logit x as scores (0, x), whose softmax is its sigmoid; any other
          number of classes has one logit each against the rest, which is ours.
Checked   tests/golden/duat__* (Barrett-python/DuAT lib/DuAT.py, Train.py).

Shapes    B images, K classes, O outputs (1 for two classes, else K), d decoder width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.contracts import Dense, Features, Readout, Size, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.structure import Reading, structure_loss
from segvit.nn.readout import logit_rows
from segvit.nn.rename import PVT_V2_RULES, Rules, rename


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, and an activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 1, *, groups: int = 1, act: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class LocalAttention(nn.Module):
    """A gate for each position and channel, from three pairs of a 1x1 and a residual depthwise 3x3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        acts = (nn.ReLU, nn.ReLU, nn.SiLU)
        self.points = nn.ModuleList(ConvNorm(dim, dim, act=act) for act in acts)
        self.depths = nn.ModuleList(ConvNorm(dim, dim, 3, groups=dim) for _ in acts)
        self.last = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = x
        for point, depth in zip(self.points, self.depths, strict=True):
            gate = point(gate)
            gate = gate + depth(gate)
        return x + x * self.last(gate).relu().sigmoid()


class GlobalAttention(nn.Module):
    """A gate for each channel, from the mean over all positions that one learned map weighs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(dim, 1, 1)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1), nn.LayerNorm([2 * dim, 1, 1]), nn.ReLU(), nn.Conv2d(2 * dim, dim, 1)
        )
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        for parameter in self.mlp[3].parameters():  # the gate starts at one half
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.mask(x).flatten(2).softmax(-1)  # (B, 1, HW)
        context = (x.flatten(2) @ attention.mT)[..., None]  # (B, d, 1, 1)
        return x + x * self.mlp(context).sigmoid()


class GLSA(nn.Module):
    """Global-to-local spatial aggregation: (B, C, h, w) -> (B, d, h, w), C even (UserError)."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        if inputs % 2:
            raise UserError(f"a map has {inputs} channels, which DuAT halves; choose a backbone with even numbers")
        self.local_in, self.global_in = nn.Conv2d(inputs // 2, dim, 1), nn.Conv2d(inputs // 2, dim, 1)
        self.local_attention, self.global_attention = LocalAttention(dim), GlobalAttention(dim)
        self.join = ConvNorm(2 * dim, dim)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the local branch makes of the first half of the channels and the global one of the second."""
        first, second = x.chunk(2, dim=1)
        return self.local_attention(self.local_in(first)), self.global_attention(self.global_in(second))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat(self.branches(x), 1))


class SBA(nn.Module):
    """Selective boundary aggregation of a coarse and a fine map of d channels: logits (B, O, h, w) on the fine grid."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        half = dim // 2
        self.fine_in, self.coarse_in = nn.Conv2d(dim, half, 1, bias=False), nn.Conv2d(dim, half, 1, bias=False)
        self.fine, self.coarse = ConvNorm(half, half), ConvNorm(half, half)
        self.join, self.classify = ConvNorm(2 * half, dim, 3), nn.Conv2d(dim, outputs, 1, bias=False)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        fine, coarse = self.fine_in(fine), self.coarse_in(coarse)
        fine_gate, coarse_gate = fine.sigmoid(), coarse.sigmoid()
        fine, coarse = self.fine(fine), self.coarse(coarse)
        # The coarse map reads the fine one as it is after its own update.
        fine = fine + fine * fine_gate + (1 - fine_gate) * like(coarse_gate * coarse, fine)
        coarse = coarse + coarse * coarse_gate + (1 - coarse_gate) * like(fine_gate * fine, coarse)
        return self.classify(self.join(torch.cat([like(coarse, fine), fine], 1)))


class DuATHead(nn.Module):
    """Four maps from fine to coarse -> logits of the GLSA path at the second map's grid and of SBA at the first's."""

    def __init__(self, inputs: Sequence[int], dim: int, outputs: int) -> None:
        super().__init__()
        self.boundary = ConvNorm(inputs[0], dim, 3)
        self.glsa2, self.glsa3, self.glsa4 = (GLSA(width, dim) for width in inputs[1:])
        self.deep, self.join = ConvNorm(2 * dim, dim), ConvNorm(3 * dim, dim)
        self.classify = nn.Conv2d(dim, outputs, 1, bias=False)
        self.sba = SBA(dim, outputs)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        second, third = self.glsa2(maps[1]), self.glsa3(maps[2])
        fourth = like(self.glsa4(maps[3]), third)
        path = self.classify(self.join(torch.cat([like(fourth, second), like(third, second), second], 1)))
        semantic = like(self.deep(torch.cat([fourth, third], 1)), second)
        return path, self.sba(semantic, self.boundary(maps[0]))


class DuAT(nn.Module):
    """A pyramid of four maps and the head; `extras` hold the logits `glsa` and `sba` (B, O, h, w), each on its grid."""

    def __init__(self, backbone: Pyramid, *, dim: int, num_classes: int) -> None:
        super().__init__()
        self.binary = num_classes == 2
        self.backbone, self.head = backbone, DuATHead(backbone.dims, dim, 1 if self.binary else num_classes)

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        glsa, sba = self.head(features.maps)
        total = resize(glsa, features.covers) + resize(sba, features.covers)
        if self.binary:
            total = torch.cat([torch.zeros_like(total), total], 1)
        return Dense(total, features.extras | {"glsa": glsa, "sba": sba}, features.covers)


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def like(x: Tensor, other: Tensor) -> Tensor:
    """A map on the grid of another."""
    return resize(x, (other.shape[-2], other.shape[-1]))


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255, reading: Reading = "released",
    window: int = 31, weight: float = 5.0, smooth: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """The structure loss of both paths; `reading` chooses between the released code's cross entropy and the paper's."""
    outputs = out.extras["sba"].shape[1]
    first = 1 if outputs == 1 and out.logits.shape[1] == 2 else 0  # one logit for two classes is the second one's
    ids = torch.arange(first, first + outputs, device=masks.device)[:, None, None]
    inside, valid = masks[:, None] == ids, (masks != ignore_index)[:, None]
    losses: dict[str, Tensor] = {}
    for name in ("glsa", "sba"):
        logits = logits_at(out._replace(logits=out.extras[name]), masks)
        terms = structure_loss(
            logits, inside.to(logits.dtype), valid, totals, reading=reading, window=int(window), weight=weight,
            smooth=smooth,
        )  # fmt: skip
        losses |= {f"loss_{name}_bce": terms.bce, f"loss_{name}_iou": terms.iou}
    return losses


def duat(
    *,
    num_classes: int,
    backbone: str = "pvt_v2_b2",
    weights: str | None = None,
    dim: int = 32,
    drop_path: float = 0.1,
    in_channels: int = 3,
) -> DuAT:
    """DuAT on PVT v2 or any pyramid of timm with maps of even widths; `dim` is the decoder's width, even too."""
    trunk = pyramid(backbone, weights=weights, drop_path=drop_path, in_channels=in_channels)
    if dim < 2 or dim % 2:
        raise UserError(f"dim is {dim}; DuAT halves it, so give an even number such as 32")
    return DuAT(trunk, dim=dim, num_classes=num_classes)


duat_pvt_v2_b2 = partial(duat, backbone="pvt_v2_b2")

HEAD: Rules = (
    (r"^GLSA_c(\d)\.", r"head.glsa\1."),
    (r"\.conv1_1\.", ".join."),
    (r"\.local_11conv\.", ".local_in."),
    (r"\.global_11conv\.", ".global_in."),
    (r"\.GlobelBlock\.conv_mask\.", ".global_attention.mask."),
    (r"\.GlobelBlock\.channel_mul_conv\.", ".global_attention.mlp."),
    (r"\.local\.conv7\.0\.", ".local_attention.last."),
    *((rf"\.local\.conv{2 * i + 1}\.", f".local_attention.points.{i}.") for i in range(3)),
    *((rf"\.local\.conv{2 * i + 2}\.", f".local_attention.depths.{i}.") for i in range(3)),
    (r"(\.(?:points|depths)\.\d)\.0\.", r"\1.conv."),
    (r"(\.(?:points|depths)\.\d)\.1\.", r"\1.bn."),
    (r"^L_feature\.", "head.boundary."),
    (r"^fuse\.", "head.deep."),
    (r"^fuse2\.0\.", "head.join."),
    (r"^fuse2\.1\.", "head.classify."),
    (r"^SBA\.fc1\.", "head.sba.fine_in."),
    (r"^SBA\.fc2\.", "head.sba.coarse_in."),
    (r"^SBA\.d_in1\.", "head.sba.fine."),
    (r"^SBA\.d_in2\.", "head.sba.coarse."),
    (r"^SBA\.conv\.0\.", "head.sba.join."),
    (r"^SBA\.conv\.1\.", "head.sba.classify."),
)
UNUSED = r"^GLSA_c\d\.(conv1_1_1|local\.ca|local\.sa)\.|^backbone\.(head|norm)\."


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (Barrett-python/DuAT, on its copy of PVT v2) into ours."""
    return rename(state, [*HEAD, *PVT_V2_RULES], unused=UNUSED)
