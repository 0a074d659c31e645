"""Builders of our counterparts to the golden cases of SSF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.adapters import ssf
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from tests.golden.run import Case


def scale_last(case: Case, channels: int, *, channels_last: bool) -> nn.Module:
    """The official network-level pair where no norm is before it."""
    pair = ssf.Scaled(nn.Identity(), channels, channels_last=channels_last, like=case.weights["ssf_scale_1"])
    pair.load_state_dict({name: case.weights[f"{name}_1"] for name in ("ssf_scale", "ssf_shift")})
    return pair


def scaled_vit(case: Case) -> dict[str, Tensor]:
    """Image -> tokens, logits and gradients unmerged; then the merged weights and their logits."""
    config, weights, image = case.config, case.weights, case.inputs["image"]
    pooled = config["global_pool"] == "avg"
    trunk = VisionTransformer(
        img_size=config["image_size"], patch_size=config["patch_size"], embed_dim=config["embed_dim"],
        depth=config["depth"], num_heads=config["num_heads"], mlp_ratio=config["mlp_ratio"], num_classes=0,
        qkv_bias=config["qkv_bias"], init_values=config["layer_scale_init"], class_token=config["class_token"],
        global_pool=config["global_pool"] if config["class_token"] else "avg",
        embed_norm_layer=partial(nn.LayerNorm, eps=1e-6) if config["patch_norm"] else None,
    )  # fmt: skip
    trunk.pretrained_cfg = {}
    backbone = PlainViT(trunk, out_indices=(-1,), final_norm=not pooled).requires_grad_(False)
    handle = ssf.ssf(backbone)
    last = scale_last(case, config["embed_dim"], channels_last=True) if pooled else nn.Identity()
    own = {k: v for k, v in ssf.convert(weights).items() if not (pooled and k.startswith("norm."))}
    backbone.load_state_dict(own)
    backbone.eval()

    def run() -> dict[str, Tensor]:
        step, outputs = backbone.embed(image), {}
        for index in range(config["depth"]):
            step = backbone.run(index, step)
            outputs[f"block{index}_output"] = step.tokens
        features = last(backbone.norm(step.tokens))
        token = features[:, step.prefix :].mean(1) if pooled else features[:, 0]
        if pooled:
            token = F.layer_norm(token, token.shape[-1:], weights["fc_norm.weight"], weights["fc_norm.bias"], 1e-6)
        logits = F.linear(token, weights["head.weight"], weights["head.bias"])
        return outputs | {"features": features, "logits": logits}

    outputs = run()
    outputs["logits"].square().sum().backward()
    outputs["patch_tokens"] = backbone.patch_embed.norm(backbone.patch_embed.proj(image).flatten(2).mT)
    ours = {name: parameter.grad for name, parameter in [*backbone.named_parameters(), *last.named_parameters("norm")]}
    for name in weights:
        if "ssf_" in name:
            outputs[f"grad.{name}"] = ours[next(iter(ssf.convert({name: weights[name]})))]
    handle.merge()
    outputs |= {f"merged.{name}": value for name, value in backbone.state_dict().items()}
    outputs["merged_model.logits"] = run()["logits"]
    return {name: value.detach() for name, value in outputs.items() if value is not None}


@torch.no_grad()
def scaled_convnext(case: Case) -> dict[str, Tensor]:
    """Image -> stages and logits unmerged; then the merged weights and their logits."""
    config, weights = case.config, case.weights
    network: Any = timm.create_model(
        "convnext_tiny", features_only=True, depths=config["depths"], dims=config["dims"],
        patch_size=config["stem_patch"], kernel_sizes=config["dw_kernel"],
    )  # fmt: skip
    backbone = Pyramid(network, dims=[], strides=[], channels_last=False).requires_grad_(False)
    handle = ssf.ssf(backbone)
    backbone.load_state_dict(ssf.convert(weights))
    backbone.eval()
    for stage in (network.stages_1, network.stages_2, network.stages_3):
        # The official LayerNorm2d (timm 0.6.5) divides by the unbiased deviation where its input is channels-last.
        norm = stage.downsample[0]
        norm.weight.mul_((1 - 1 / len(norm.weight)) ** 0.5)
    last = scale_last(case, config["dims"][-1], channels_last=False)

    def run() -> dict[str, Tensor]:
        stem = network.stem_1(network.stem_0(case.inputs["image"]))
        maps = network(case.inputs["image"])
        features = last(maps[-1])
        token = F.layer_norm(
            features.mean((2, 3)), features.shape[1:2], weights["head.norm.weight"], weights["head.norm.bias"],
            config["norm_eps"],
        )  # fmt: skip
        logits = F.linear(token, weights["head.fc.weight"], weights["head.fc.bias"])
        stages = {f"stage{index}_output": value for index, value in enumerate(maps)}
        return stages | {"stem": stem, "features": features, "logits": logits}

    outputs = run()
    handle.merge()
    plain = [name for name in weights if "ssf_" not in name and not name.startswith("head.")]
    numbered = ssf.convert({name: torch.tensor(index) for index, name in enumerate(plain)})
    official = {ours: plain[int(index)] for ours, index in numbered.items()}
    outputs |= {f"merged.{official[name]}": value for name, value in backbone.state_dict().items()}
    outputs["merged_model.logits"] = run()["logits"]
    return outputs


SSF: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("ssf", "vit"): scaled_vit,
    ("ssf", "convnext"): scaled_convnext,
}
