"""Builders of our counterparts to the golden cases of VPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from segvit.adapters import vpt
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from segvit.nn.attention import split_heads
from tests.golden.run import Case


def vit(config: dict[str, Any]) -> PlainViT:
    """The official backbone without its classifier."""
    trunk = VisionTransformer(
        img_size=config["image_size"], patch_size=config["patch_size"], embed_dim=config["hidden_size"],
        depth=config["num_layers"], num_heads=config["num_heads"], num_classes=0, qkv_bias=config["qkv_bias"],
        mlp_ratio=config["mlp_dim"] / config["hidden_size"],
    )  # fmt: skip
    trunk.pretrained_cfg = {}
    return PlainViT(trunk, out_indices=(-1,), final_norm=True)


def prompted_vit(case: Case) -> dict[str, Tensor]:
    """Image -> tokens after every block, logits, attention, and gradients of what trains."""
    config, weights = case.config, case.weights
    backbone = vit(config).requires_grad_(False)
    method = vpt.vpt_deep if config["deep"] else vpt.vpt_shallow
    width = config["prompt_project_dim"]
    handle = method(backbone, num_prompts=config["num_prompts"], project_dim=width if width > 0 else None)
    backbone.load_state_dict(vpt.convert(weights))
    backbone.eval()
    step = backbone.embed(case.inputs["image"])
    outputs = {"tokens_after_prompt_insertion": backbone.gap(0, step).tokens}
    for index, block in enumerate(backbone.blocks):
        attention = block.attn
        query, key, _ = attention.qkv(block.norm1(backbone.gap(index, step).tokens)).chunk(3, dim=-1)
        query, key = split_heads(query, attention.num_heads), split_heads(key, attention.num_heads)
        outputs["attention_last"] = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        step = backbone.run(index, step)
        outputs[f"block{index}_output"] = step.tokens
    encoded = backbone.norm(step.tokens)
    logits = F.linear(encoded[:, 0], weights["head.weight"], weights["head.bias"])
    (logits.square().sum() + encoded[:, step.prefix :].square().mean()).backward()
    for name in handle.names:
        official = f"grad.{name.replace('gaps.0.', 'transformer.')}"
        outputs[official] = backbone.get_parameter(name).grad
    return {name: value.detach() for name, value in (outputs | {"encoded_tokens": encoded, "logits": logits}).items()}


@torch.no_grad()
def prompted_swin(case: Case) -> dict[str, Tensor]:
    """Image -> prompts and tokens after every stage, patch merging included, and logits."""
    config, weights = case.config, case.weights
    depths = config["depths"]
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, out_indices=tuple(range(len(depths))),
        img_size=config["image_size"], patch_size=config["patch_size"], embed_dim=config["embed_dim"],
        depths=depths, num_heads=config["num_heads"], window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"], qkv_bias=config["qkv_bias"],
    )  # fmt: skip
    backbone = Pyramid(network, dims=[], strides=[], channels_last=True)
    method = vpt.vpt_deep if config["deep"] else vpt.vpt_shallow
    method(backbone, num_prompts=config["num_prompts"])
    backbone.load_state_dict(vpt.convert(weights))
    prompted = backbone.eval().network
    assert isinstance(prompted, vpt.PromptedSwin)
    stages = prompted.run(case.inputs["image"])
    outputs = {}
    for index, (prompts, maps) in enumerate(stages):
        if index + 1 < len(stages):
            merging = prompted.stages()[index + 1][1].downsample
            prompts, maps = vpt.merge_prompts(merging, prompts), merging(maps)
        outputs[f"stage{index}_output"] = torch.cat([prompts, maps.flatten(1, 2)], dim=1)
    tokens = outputs[f"stage{len(stages) - 1}_output"]
    normed = F.layer_norm(tokens, tokens.shape[-1:], weights["norm.weight"], weights["norm.bias"], config["norm_eps"])
    return outputs | {"logits": F.linear(normed.mean(1), weights["head.weight"], weights["head.bias"])}


VPT: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("vpt", "shallow"): prompted_vit,
    ("vpt", "deep"): prompted_vit,
    ("vpt", "deep_project"): prompted_vit,
    ("vpt", "swin_shallow"): prompted_swin,
    ("vpt", "swin_deep"): prompted_swin,
}
