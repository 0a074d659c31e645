"""Builders of our counterparts to the golden cases of PVT and Semantic FPN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.pvt_v2 import PyramidVisionTransformerV2, checkpoint_filter_fn
from torch import Tensor

from segvit.backbones.pvt import PVT, PVTClassifier
from segvit.nn.rename import rename
from segvit.systems import semantic_fpn
from tests.golden.run import Case


def pvt(config: dict[str, Any]) -> PVT:
    return PVT(
        dims=config["embed_dims"], heads=config["num_heads"], ratios=config["mlp_ratios"], depths=config["depths"],
        reductions=config["sr_ratios"], image_size=config["img_size"], patch=config["patch_size"],
        qkv_bias=config["qkv_bias"], strict_positions=True,
    )  # fmt: skip


@torch.no_grad()
def backbone(case: Case) -> dict[str, Tensor]:
    model = pvt(case.config)
    model.load_state_dict(case.weights)
    maps = model.eval()(case.inputs["image"]).maps
    return {f"c{i}": x for i, x in enumerate(maps, start=1)}


@torch.no_grad()
def classifier(case: Case) -> dict[str, Tensor]:
    model = PVTClassifier(pvt(case.config), case.config["num_classes"]).eval()
    own = r"^(?!cls_token$|norm\.|head\.)"
    model.load_state_dict(rename(case.weights, ((own, "trunk."),), unused=r"(?!)"))
    images = case.inputs["image"]
    return {"features": model.features(images), "logits": model(images)}


@torch.no_grad()
def v2_backbone(case: Case) -> dict[str, Tensor]:
    config = case.config
    network = PyramidVisionTransformerV2(
        depths=config["depths"], embed_dims=config["embed_dims"], num_heads=config["num_heads"],
        sr_ratios=config["sr_ratios"], mlp_ratios=config["mlp_ratios"], qkv_bias=config["qkv_bias"],
        linear=config["linear"], num_classes=0,
    )  # fmt: skip
    network.load_state_dict(checkpoint_filter_fn(case.weights, network))
    maps, x = {}, network.eval().patch_embed(case.inputs["image"])
    for i, stage in enumerate(network.stages, start=1):
        x = stage(x)
        maps[f"c{i}"] = x
    return maps


@torch.no_grad()
def fpn_head(case: Case) -> dict[str, Tensor]:
    config = case.config
    fpn = semantic_fpn.FPN(config["in_channels"], config["fpn_channels"])
    head = semantic_fpn.FPNHead(
        config["fpn_channels"], config["head_channels"], strides=config["feature_strides"],
        num_classes=config["num_classes"],
    )  # fmt: skip
    state = semantic_fpn.convert(case.weights)
    fpn.load_state_dict({key.removeprefix("fpn."): v for key, v in state.items() if key.startswith("fpn.")})
    head.load_state_dict({key.removeprefix("head."): v for key, v in state.items() if key.startswith("head.")})
    levels = fpn.eval()([case.inputs[f"c{i}"] for i in range(1, 5)])
    return {"logits": head.eval()(levels), **{f"p{i}": level for i, level in enumerate(levels, start=2)}}


@torch.no_grad()
def semfpn_full(case: Case) -> dict[str, Tensor]:
    config = case.config
    trunk = pvt(config["backbone"])
    fpn = semantic_fpn.FPN(trunk.dims, config["fpn_channels"])
    head = semantic_fpn.FPNHead(
        config["fpn_channels"], config["head_channels"], strides=(4, 8, 16, 32), num_classes=config["num_classes"]
    )
    model = semantic_fpn.SemanticFPN(trunk, fpn, head)
    model.load_state_dict(semantic_fpn.convert(case.weights))
    images = case.inputs["image"]
    out = model.eval()(images)
    full = F.interpolate(out.logits, size=out.covers, mode="bilinear", align_corners=False)
    return {"logits_stride4": out.logits, "logits": full[..., : images.shape[-2], : images.shape[-1]]}


PVT_CASES: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("pvt", "backbone"): backbone,
    ("pvt", "classifier"): classifier,
    ("pvt", "v2_backbone"): v2_backbone,
    ("pvt", "v2_linear_backbone"): v2_backbone,
    ("pvt", "semfpn_full"): semfpn_full,
    ("semfpn", "head"): fpn_head,
}
