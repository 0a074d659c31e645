"""The families learn: trained from nothing on the generated shapes they beat what colour alone can tell.

The baseline gives each pixel the class whose mean training colour is nearest; the class of most pixels everywhere would
be far below it. Small networks, one to two minutes each on one thread. Of the classic families U-Net stands for all:
the others are the same libraries' layers behind the same contract.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from segvit.data.dataset import open_dataset
from segvit.data.transforms import Augment
from segvit.engine.settings import Optim, Schedule
from segvit.tasks.dense import train
from segvit.tasks.experiment import Experiment

DATA = "synthetic:shapes?train=400&val=40&size=64"
BASELINE = 0.50  # what colour alone reaches is 0.49
VIT: dict[str, Any] = {"image_size": 64, "patch_size": 4, "depth": 3, "embed_dim": 64, "drop_path": 0.0}


class Case(NamedTuple):
    """A small network and the validation mIoU that it must reach; it was 0.03 or more above when this was written."""

    name: str
    options: dict[str, Any]
    miou: float
    steps: int = 400
    lr: float = 1.5e-3
    loss: dict[str, float] = {}
    batch: int = 8


CASES = [
    Case(
        "segvit_vit_tiny", VIT | {"out_indices": [0, 2], "layers": 2, "dropout": 0.0}, 0.56,
        loss={"dice_weight": 5.0, "alpha": 0.5},
    ),
    Case("segmenter_vit_tiny", VIT | {"dropout": 0.0}, 0.60),
    Case("setr_naive_vit_tiny", VIT | {"out_indices": [0, 1, 2], "width": 64}, 0.60),
    Case("setr_pup_vit_tiny", VIT | {"patch_size": 8, "out_indices": [0, 1, 2], "width": 32}, 0.57),
    Case("setr_mla_vit_tiny", VIT | {"out_indices": [0, 1, 2], "width": 32}, 0.64),
    Case(
        "setr_hlg_tiny",
        {
            "dims": [32, 32, 64, 64], "heads": [2, 2, 4, 4], "depths": [1, 2, 1, 1], "width": 64, "drop_path": 0.0,
            "dropout": 0.0,
        },
        0.80,
    ),
    Case(
        "rsseg_vit_tiny",
        VIT | {"depth": 4, "out_indices": [0, 1, 2, 3], "dim": 64, "layers": 2, "dropout": 0.0}, 0.66,
    ),
    Case(
        "semantic_fpn_pvt_tiny",
        {
            "depths": [1] * 4, "dims": [32, 64, 80, 128], "position_size": 64, "fpn_dim": 64, "head_dim": 32,
            "drop_path": 0.0, "dropout": 0.0,
        },
        0.61, steps=500,
    ),
    Case(
        "semantic_fpn_pvt_v2_b0",
        {"backbone": "pvt_v2_b0", "fpn_dim": 64, "head_dim": 32, "drop_path": 0.0, "dropout": 0.0}, 0.55,
    ),
    Case(
        "ftn_tiny",
        {"depths": [1, 1, 2, 1], "embed_dim": 32, "dim": 64, "drop_path": 0.0, "dropout": 0.0}, 0.60, steps=500,
    ),
    Case("ddrnet_23_slim", {"planes": 16, "spp_planes": 32, "head_planes": 32}, 0.64, steps=600, lr=3e-3),
    Case("unet", {"backbone": "resnet18", "decoder": {"decoder_channels": [64, 32, 16, 16, 8]}}, 0.63, steps=250),
    Case("fpn", {"backbone": "resnet18"}, 0.75),
    Case("pspnet", {"backbone": "resnet18"}, 0.75),
    Case("deeplabv3_plus", {"backbone": "resnet18"}, 0.75),
    Case("lraspp", {}, 0.55),
    Case("fcn", {}, 0.55, steps=400),
    Case("deeplabv3", {"backbone": "resnet18"}, 0.60, steps=300),
    Case(
        "dpt",
        {
            "backbone": "vit_tiny_patch16_224", "image_size": 64,
            "decoder": {"decoder_intermediate_channels": [32, 32, 64, 64], "decoder_fusion_channels": 32},
        },
        0.55, steps=1500,
    ),
    Case("segformer", {"backbone": "resnet18"}, 0.75, steps=250),
    Case("upernet", {"backbone": "resnet18", "decoder": {"decoder_channels": 64}}, 0.72, steps=250),
    Case(
        "unet_plus_plus", {"backbone": "resnet18", "decoder": {"decoder_channels": [64, 32, 32, 16, 16]}}, 0.70,
        steps=200,
    ),
    # Slower from nothing: its queries must find their own places first, which pretrained position embeddings tell.
    Case(
        "segvit_shrunk_vit_tiny",
        VIT | {
            "patch_size": 8, "depth": 4, "embed_dim": 128, "out_indices": [1, 3], "shrink_at": 2, "layers": 2,
            "heads": 4, "dim": 128, "dropout": 0.0,
        },
        0.55, steps=2500, lr=1e-3, loss={"dice_weight": 5.0, "alpha": 0.5}, batch=16,
    ),
]  # fmt: skip


@pytest.mark.slow
def test_the_baseline_is_what_colour_tells() -> None:
    demo = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "demo.py"))
    assert 0.4 < demo["color_baseline"](open_dataset(DATA)) < BASELINE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_training(case: Case, tmp_path: Path) -> None:
    assert case.miou >= BASELINE + 0.05
    result = train(
        Experiment(
            data=DATA, out=str(tmp_path / "run"), model=case.name, options=case.options, steps=case.steps,
            batch_size=case.batch, loss=case.loss, val_every=0, checkpoint_every=case.steps, workers=0, device="cpu",
            precision="fp32", schedule=Schedule(kind="cosine", warmup=30),
            augment=Augment(crop=(64, 64), ratio_range=(0.9, 1.2), cat_max_ratio=1.0, photometric=False),
            optim=Optim(lr=case.lr, weight_decay=0.05, lr_mult={}, clip=5.0),
        )
    )  # fmt: skip
    assert result.metrics is not None
    assert result.metrics.miou >= case.miou
