"""RetinaNet on PVT: sizes of the paper, levels and anchors, and what may be asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segvit.contracts import UserError
from segvit.systems.retinanet import DETECTORS, STRIDES, retinanet

TINY: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 16, 40, 64], "fpn_dim": 16, "size": (64, 128)}


def test_parameters_of_the_paper() -> None:
    """W. Wang et al., 2021, table 3: 23.0 M for PVT-Tiny with 80 classes."""
    assert round(sum(p.numel() for p in DETECTORS["retinanet_pvt_tiny"](num_classes=80).parameters()) / 1e6, 1) == 23.0


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["pvt_tiny", "pvt_v2_b0"])
def test_levels(backbone: str) -> None:
    options = TINY if backbone == "pvt_tiny" else {"fpn_dim": 256}  # the width of its last map, too
    neck: Any = retinanet(num_classes=3, backbone=backbone, **options).backbone
    levels = neck.eval()(torch.randn(1, 3, 128, 256))
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"]
    assert [x.shape[-2:] for x in levels.values()] == [(128 // stride, 256 // stride) for stride in STRIDES]
    raw = neck.backbone(torch.randn(1, 3, 128, 256)).maps[-1]
    assert neck.fpn.extra_blocks.p6.in_channels == raw.shape[1]
    assert not neck.fpn.extra_blocks.use_P5


def test_anchors() -> None:
    network: Any = retinanet(num_classes=3, anchor_scale=2.0, **TINY)
    sides = [cell.prod(1).sqrt() for cell in ((a[:, 2:] - a[:, :2]) for a in network.anchor_generator.cell_anchors)]
    assert [len(side) for side in sides] == [9] * 5
    for side, stride in zip(sides, STRIDES, strict=True):
        expected = torch.tensor([2.0 * stride * 2 ** (i / 3) for i in range(3)] * 3)
        torch.testing.assert_close(side, expected, atol=1.5, rtol=0)  # corners are whole pixels


def test_training_gives_losses_and_evaluation_boxes(seeded: torch.Generator) -> None:
    network = retinanet(num_classes=3, **TINY)
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]  # fmt: skip
    losses = network.train()(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert missing == []
    with torch.no_grad():
        found = network.eval()(images)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores"}] * 2


def test_mistakes() -> None:
    with pytest.raises(UserError, match="depths and dims are for PVT v1"):
        retinanet(num_classes=3, backbone="pvt_v2_b0", depths=[1, 1, 1, 1])
    with pytest.raises(UserError, match="RetinaNet reads maps at 8, 16 and 32"):
        retinanet(num_classes=3, backbone="vit_tiny_patch16_224")
