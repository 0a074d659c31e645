"""Builders of our counterparts to DuAT's golden cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from segvit.backbones.pyramid import Pyramid
from segvit.losses.structure import outline_weights, structure_loss
from segvit.systems import duat
from tests.golden.run import Case


def pvt_v2(config: dict[str, Any]) -> Pyramid:
    """PVT v2 of any size behind the pyramid's contract."""
    network = timm.create_model(
        "pvt_v2_b0", features_only=True, out_indices=(0, 1, 2, 3), depths=tuple(config["depths"]),
        embed_dims=tuple(config["embed_dims"]), num_heads=tuple(config["num_heads"]),
        sr_ratios=tuple(config["sr_ratios"]), mlp_ratios=tuple(config["mlp_ratios"]),
        qkv_bias=config.get("qkv_bias", True), linear=config.get("linear", False),
    )  # fmt: skip
    for name, module in network.named_modules():
        if isinstance(module, nn.LayerNorm) and name.rpartition(".")[2] in ("norm1", "norm2"):
            module.eps = config.get("block_norm_eps", 1e-6)
    return Pyramid(network, dims=list(config["embed_dims"]), strides=[4, 8, 16, 32], channels_last=False)


def part(theirs: str, ours: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One module's state dict, through the conversion of whole checkpoints."""
    state = duat.convert({theirs + key: value for key, value in weights.items()})
    return {key.removeprefix(ours): value for key, value in state.items()}


@torch.no_grad()
def full(case: Case) -> dict[str, Tensor]:
    trunk = pvt_v2(case.config)
    model = duat.DuAT(trunk, dim=case.config["dim"], num_classes=2)
    model.load_state_dict(duat.convert(case.weights))
    images = case.inputs["image"]
    maps = model.eval().backbone(images).maps
    out = model(images)
    paths = {"p1": duat.resize(out.extras["glsa"], out.covers), "p2": duat.resize(out.extras["sba"], out.covers)}
    scores = duat.READOUT(out, (images.shape[-2], images.shape[-1]), range(images.shape[-2]))
    found = {f"c{i}": x for i, x in enumerate(maps, start=1)} | paths
    return found | {"prediction": scores.softmax(1)[:, 1:]}


@torch.no_grad()
def glsa(case: Case) -> dict[str, Tensor]:
    module = duat.GLSA(case.config["input_dim"], case.config["embed_dim"])
    module.load_state_dict(part("GLSA_c4.", "head.glsa4.", case.weights))
    x = case.inputs["x"]
    local, whole = module.eval().branches(x)
    return {"local_branch": local, "global_branch": whole, "out": module(x)}


@torch.no_grad()
def sba(case: Case) -> dict[str, Tensor]:
    module = duat.SBA(case.config["input_dim"], case.weights["conv.1.weight"].shape[0])
    module.load_state_dict(part("SBA.", "head.sba.", case.weights))
    return {"out": module.eval()(case.inputs["h"], case.inputs["l"])}


def losses(case: Case) -> dict[str, Tensor]:
    config, inside = case.config, case.inputs["mask"]
    edges: dict[str, Any] = {"window": config["kernel"], "weight": config["weight"]}
    totals = {"valid": torch.tensor(inside.numel()), "images": torch.tensor(len(inside))}
    found = {"weight": outline_weights(inside, **edges)}
    for theirs, ours in {"official": "released", "per_pixel": "per_pixel"}.items():
        logits = case.inputs["pred"].clone().requires_grad_()
        terms = structure_loss(
            logits, inside, torch.ones_like(inside, dtype=torch.bool), totals, reading=ours, smooth=config["smooth"],
            **edges,
        )  # fmt: skip
        loss = terms.bce + terms.iou
        found |= {f"loss_{theirs}": loss.detach(), f"grad_{theirs}": torch.autograd.grad(loss, logits)[0]}
    return found


DUAT: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("duat", "full"): full,
    ("duat", "glsa"): glsa,
    ("duat", "sba"): sba,
    ("duat", "structure_loss"): losses,
}
