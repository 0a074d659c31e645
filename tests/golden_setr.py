"""Builders of our counterparts to the golden cases of SETR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT
from segvit.nn.tokens import Step
from segvit.systems import segvit, setr
from tests.golden.run import Case


def loaded(module: nn.Module, state: dict[str, Tensor], prefix: str) -> nn.Module:
    """The module with the part of an official state dict that becomes `prefix`, every key used and none missing."""
    own = {key.removeprefix(prefix): value for key, value in setr.convert(state).items() if key.startswith(prefix)}
    module.load_state_dict(own)
    return module.eval()


def square_map(tokens: Tensor) -> Tensor:
    """Tokens as a square map; by the official rule the first is a class token unless their number divides by 48."""
    return segvit.square(tokens[:, 1 if tokens.shape[1] % 48 else 0 :].mT[..., None])


def up_head(config: dict[str, Any], weights: dict[str, Tensor]) -> setr.UpHead:
    width, in_dim, kernel, _ = weights["decode_head.conv_0.weight"].shape  # 256 is a constant of the official file
    deep = "decode_head.conv_4.weight" in weights
    factor = 4 if not deep and config.get("num_upsampe_layer", 1) == 2 else 1
    head = setr.UpHead(
        in_dim, num_classes=config["num_classes"], width=width, kernel=kernel, convs=4 if deep else 1, factor=factor
    )
    loaded(head, weights, "head.")
    return head


def up_logits(head: setr.UpHead, tokens: Tensor, side: int) -> Tensor:
    """The official output: PUP's side is 16 times that of the tokens, the others are resized to the image."""
    logits = head([square_map(tokens)])
    return setr.enlarge(logits, 2) if len(head.convs) > 1 else setr.resize(logits, (side, side))


@torch.no_grad()
def up(case: Case) -> dict[str, Tensor]:
    head = up_head(case.config, case.weights)
    return {"logits": up_logits(head, case.inputs["tokens"], case.config["img_size"])}


def mla_parts(weights: dict[str, Tensor], classes: int) -> tuple[setr.Aggregation, setr.MLAHead]:
    width, in_dim = weights["backbone.mla.mla_p2_1x1.0.weight"].shape[:2]
    channels = weights["decode_head.mlahead.head2.0.weight"].shape[0]
    aggregation = setr.Aggregation([in_dim] * 4, width)
    head = setr.MLAHead(width, channels, levels=4, num_classes=classes)
    loaded(aggregation, weights, "aggregation.")
    loaded(head, weights, "head.")
    return aggregation, head


def mla_outputs(case: Case, weights: dict[str, Tensor], tokens: list[Tensor]) -> dict[str, Tensor]:
    """All outputs of MLA from the tokens of four depths, shallow to deep, without class tokens."""
    config = case.config
    aggregation, head = mla_parts(weights, config["num_classes"])
    maps = aggregation([segvit.square(t.mT[..., None]) for t in tokens])
    logits = setr.resize(head(maps), segvit.as_size(config["img_size"]))
    return {"logits": logits, "mlahead": head.concatenate(maps)} | {f"p{i}": m for i, m in enumerate(maps, start=2)}


@torch.no_grad()
def mla(case: Case) -> dict[str, Tensor]:
    names = {key: key.replace("norms.", "backbone.norm_") for key in case.weights}
    weights = {f"backbone.{new}" if new.startswith("mla.") else new: case.weights[old] for old, new in names.items()}
    return mla_outputs(case, weights, [case.inputs[f"tok{i}"] for i in range(4)])


def vit(config: dict[str, Any], weights: dict[str, Tensor], *, dropped: bool) -> PlainViT:
    trunk = VisionTransformer(
        img_size=config["img_size"], patch_size=config["patch_size"], embed_dim=config["embed_dim"],
        depth=config["depth"], num_heads=config["num_heads"], mlp_ratio=config.get("mlp_ratio", 4),
        qkv_bias=config.get("qkv_bias", True), num_classes=0, final_norm=False,
    )  # fmt: skip
    trunk.pretrained_cfg = {}
    network = PlainViT(trunk, out_indices=[-1], prefix_tokens="drop" if dropped else "keep", position_mode="bilinear")
    loaded(network, weights, "backbone.")
    return network


def block_tokens(network: PlainViT, image: Tensor) -> list[Tensor]:
    """The tokens after every block, the class token first where it is kept."""
    steps: list[Step] = []
    for index in range(len(network.blocks)):
        steps.append(network.run(index, steps[-1] if steps else network.embed(image)))
    return [step.tokens for step in steps]


@torch.no_grad()
def whole_up(case: Case) -> dict[str, Tensor]:
    """Image -> the tokens of every block and the logits; the head reads the last block."""
    config, image = case.config, case.inputs["image"]
    tokens = block_tokens(vit(config, case.weights, dropped=False), image)
    logits = up_logits(up_head(config, case.weights), tokens[-1], config["img_size"])
    return {"logits": logits} | {f"feat{i}": t for i, t in enumerate(tokens)}


@torch.no_grad()
def whole_mla(case: Case) -> dict[str, Tensor]:
    """Image -> the aggregated maps, which the official backbone returns, and the logits."""
    tokens = block_tokens(vit(case.config, case.weights, dropped=True), case.inputs["image"])
    chosen = [tokens[index] for index in case.config.get("mla_index", (5, 11, 17, 23))]
    outputs = mla_outputs(case, case.weights, chosen)
    return outputs | {f"feat{i}": outputs[f"p{i + 2}"] for i in range(4)}


SETR: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("setr", "naive"): up,
    ("setr", "pup"): up,
    ("setr", "mla"): mla,
    ("setr", "whole_naive"): whole_up,
    ("setr", "whole_pup"): whole_up,
    ("setr", "whole_mla"): whole_mla,
}
