"""Builders of our counterparts to FTN's golden cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.backbones.pgt import PGT, Block
from segvit.nn.fpn import FPN
from segvit.systems import ftn
from tests.golden.run import Case

FOUND = ("branch32", "branch16", "branch8")


def encoder(config: dict[str, Any]) -> PGT:
    return PGT(
        dim=config["embed_dims"], depths=config["depths"], heads=config["num_heads"], groups=config["group_nums"],
        ratio=config["mlp_ratio"], patch=config["patch_size"], out_indices=config["out_indices"],
    )  # fmt: skip


def decoder(config: dict[str, Any]) -> ftn.FPTHead:
    return ftn.FPTHead(
        config["channels"], num_classes=config["num_classes"], heads=config["num_heads"], ratio=config["mlp_ratio"],
        blocks=config["num_layers"], reductions=config["sra_ratios"],
        position_sizes=config.get("ape_sizes") if config.get("use_ape") else None,
    )  # fmt: skip


def loaded(module: Any, state: dict[str, Tensor], prefix: str) -> Any:
    """The module with the part of a converted state under the prefix that the whole network would give it."""
    converted = ftn.convert({prefix + key: value for key, value in state.items()})
    ours = {"decode_head.": "head."}.get(prefix, prefix)
    module.load_state_dict({key.removeprefix(ours): value for key, value in converted.items()})
    return module.eval()


@torch.no_grad()
def pgt(case: Case) -> dict[str, Tensor]:
    maps = loaded(encoder(case.config), case.weights, "backbone.")(case.inputs["image"]).maps
    return {f"s{i + 1}": x for i, x in zip(case.config["out_indices"], maps, strict=True)}


@torch.no_grad()
def pgt_block(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["x"]
    block = Block(
        config["embed_dims"], heads=config["num_heads"], ratio=config["mlp_ratio"], groups=config["group_num"],
        drop_path=0.0,
    )  # fmt: skip
    loaded(block, case.weights, "")
    grid = (x.shape[-2], x.shape[-1])
    tokens = x.flatten(2).mT
    found = {"attention": block.attn(block.norm1(tokens), grid), "out": block(tokens, grid)}
    return {name: value.mT.unflatten(2, grid) for name, value in found.items()}


@torch.no_grad()
def fpt_head(case: Case) -> dict[str, Tensor]:
    head = loaded(decoder(case.config), case.weights, "decode_head.")
    logits, outputs = head([case.inputs[name] for name in ("x8", "x16", "x32")])
    return {"logits": logits, **dict(zip(FOUND, outputs, strict=True))}


@torch.no_grad()
def fpt_head_asreleased(case: Case) -> dict[str, Tensor]:
    """The released head's mistake, an exchange of height and width after every stage, made here and only here."""
    head, outputs = loaded(decoder(case.config), case.weights, "decode_head."), []
    for b, name in enumerate(("x32", "x16", "x8")):
        x = case.inputs[name]
        for s, stage in enumerate(head.branches[b]):
            x = x if s == 0 else F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = ftn.run(stage, x).mT
        outputs.append(x)
    return {"logits": head.classify(torch.stack(outputs).sum(0)), **dict(zip(FOUND, outputs, strict=True))}


@torch.no_grad()
def full(case: Case) -> dict[str, Tensor]:
    config, images = case.config, case.inputs["image"]
    backbone = encoder(config["backbone"])
    model = ftn.FTN(backbone, FPN(backbone.dims, config["head"]["channels"]), decoder(config["head"]), None)
    model.load_state_dict(ftn.convert(case.weights))
    out = model.eval()(images)
    whole = F.interpolate(out.logits, size=out.covers, mode="bilinear", align_corners=False)
    return {"logits_stride8": out.logits, "logits": whole[..., : images.shape[-2], : images.shape[-1]]}


FTN: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("ftn", "pgt"): pgt,
    ("ftn", "pgt_block"): pgt_block,
    ("ftn", "fpt_head"): fpt_head,
    ("ftn", "fpt_head_asreleased"): fpt_head_asreleased,
    ("ftn", "full"): full,
}
