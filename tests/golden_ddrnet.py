"""Builders of our counterparts to DDRNet's golden cases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segvit.systems import ddrnet
from tests.golden.run import Case


@torch.no_grad()
def network(case: Case) -> dict[str, Tensor]:
    config = case.config
    split = any(key.startswith("layer3_1.") for key in case.weights)
    model = ddrnet.ddrnet(
        num_classes=config["num_classes"], layers=tuple(config["layers"]), planes=config["planes"],
        spp_planes=config["spp_planes"], head_planes=config["head_planes"], aux=config["augment"], split=split,
        aux_planes=case.weights["seghead_extra.conv1.weight"].shape[0] if config["augment"] else None,
    )  # fmt: skip
    model.load_state_dict(ddrnet.convert(case.weights))
    model.train()  # else the auxiliary head, which always runs in the original, does not
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    out = model(case.inputs["image"])
    names = {"high_layer5": "high", "low_layer5": "low", "dappm": "context"}
    found = {"main": out.logits, **{theirs: out.extras[ours] for theirs, ours in names.items()}}
    return found | ({"aux": out.extras["aux"]} if config["augment"] else {})


@torch.no_grad()
def dappm(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = ddrnet.DAPPM(config["in_channels"], config["branch_channels"], config["out_channels"])
    module.load_state_dict(case.weights)
    return {"out": module.eval()(case.inputs["x"])}


DDRNET: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("ddrnet", "network"): network,
    ("ddrnet", "dappm"): dappm,
}
