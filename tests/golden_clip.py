"""Builders of our counterparts to the golden cases of CLIP, and to those of its towers in ZegCLIP and DenseCLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.backbones.clip import ClipResNet, clip_vit, convert_vision
from segvit.backbones.vit import PlainViT
from segvit.text.architecture import TextConfig, VisionConfig
from segvit.text.templates import fill
from segvit.text.tokenize import tokenize
from segvit.text.tower import TextTower, convert_text, end_positions, insert_context
from tests.golden.run import Case


def text_of(config: dict[str, Any], weights: dict[str, Tensor]) -> TextTower:
    """The text tower of a case; its token table is stored by the rows that are used."""
    state = {key: value for key, value in weights.items() if "::" not in key}
    key, width = "token_embedding.weight", weights["ln_final.weight"].shape[0]
    if key not in state:
        state[key] = torch.zeros(config["vocab_size"], width)
        state[key][weights[f"{key}::ids"].long()] = weights[f"{key}::rows"]
    layers, heads = (config.get(f"transformer_{name}", config.get(f"text_{name}")) for name in ("layers", "heads"))
    tower = TextTower(
        TextConfig(
            width=width, layers=layers, heads=heads, embed_dim=config["embed_dim"], vocab_size=config["vocab_size"],
            context_length=config["context_length"],
        )
    )  # fmt: skip
    tower.load_state_dict(convert_text(state, context_length=config["context_length"]))
    return tower.eval().requires_grad_(False)


def vit_of(config: dict[str, Any], weights: dict[str, Tensor], **options: Any) -> PlainViT:
    """A ViT tower with keys that have no `visual.`; `config` in ZegCLIP's words."""
    side = config["input_resolution"]
    vit = clip_vit(
        VisionConfig(
            width=config["width"], layers=config["layers"], heads=config["heads"], embed_dim=config["output_dim"],
            image_size=side, patch_size=config["patch_size"],
        ),
        image_size=(side, side), **options,
    )  # fmt: skip
    own = convert_vision(weights, vit)
    if not config.get("get_embeddings", True):  # then the original has no way to the joint space
        own = {key: value for key, value in vit.state_dict().items() if key.startswith("embedding.")} | own
    vit.load_state_dict(own)
    return vit.eval()


def whole_patches(vit: PlainViT, image: Tensor) -> Tensor:
    """What the originals' patch convolution sees: it leaves out what fills no patch, where we add zeros."""
    height, width = (side // patch * patch for side, patch in zip(image.shape[-2:], vit.patch, strict=True))
    return image[..., :height, :width]


def resnet_of(config: dict[str, Any], weights: dict[str, Tensor]) -> ClipResNet:
    """A ResNet tower with keys that have no `visual.`; `config` in DenseCLIP's words."""
    side = config["input_resolution"]
    resnet = ClipResNet(
        VisionConfig(
            width=config["width"], layers=tuple(config["layers"]), heads=config.get("attnpool_heads", 32),
            embed_dim=config["output_dim"], image_size=side,
        ),
        image_size=(side, side), padded=False,
    )  # fmt: skip
    resnet.load_state_dict(convert_vision(weights, resnet))
    return resnet.eval()


def tokenizer(case: Case) -> dict[str, Tensor]:
    config = case.config
    return {"tokens": tokenize(config["strings"], context_length=config["context_length"], truncate=config["truncate"])}


@torch.no_grad()
def towers(case: Case) -> dict[str, Tensor]:
    config, weights = case.config, case.weights
    visual = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    common = {
        "layers": config["vision_layers"], "width": config["vision_width"], "output_dim": config["embed_dim"],
        "input_resolution": config["image_resolution"],
    }  # fmt: skip
    image: PlainViT | ClipResNet
    if isinstance(config["vision_layers"], list):
        heads = config.get("vision_attn_heads", config["vision_width"] * 32 // 64)
        image = resnet_of(common | {"attnpool_heads": heads}, visual)
    else:
        heads = config.get("vision_heads", config["vision_width"] // 64)
        image = vit_of(common | {"heads": heads, "patch_size": config["patch"]}, visual)
    pooled = image(case.inputs["image"]).pooled
    text = text_of(config, weights)(case.inputs["tokens"].long())
    assert pooled is not None
    cosine = F.normalize(pooled, dim=-1) @ F.normalize(text, dim=-1).T
    scale = weights["logit_scale"].exp()
    assert torch.equal(tokenize(config["strings"], context_length=config["context_length"]), case.inputs["tokens"])
    return {
        "image_features": pooled, "text_features": text, "logits_per_image": scale * cosine,
        "logits_per_text": scale * cosine.T,
    }  # fmt: skip


@torch.no_grad()
def zegclip_text(case: Case) -> dict[str, Tensor]:
    config = case.config
    sentences = [fill(config["template"], name) for name in config["class_names"]]
    tokens = tokenize(sentences, context_length=config["context_length"])
    assert torch.equal(tokens, case.inputs["tokens"].long())
    embedding = text_of(config, case.weights)(tokens)
    return {"embedding": embedding, "embedding_normalised": F.normalize(embedding, dim=-1)}


@torch.no_grad()
def zegclip_plain_encoder(case: Case) -> dict[str, Tensor]:
    config, out_indices = case.config, case.config["out_indices"]
    vit = vit_of(
        config, case.weights, out_indices=out_indices, position_mode="bilinear", doubled_class=True
    )  # fmt: skip
    features = vit(whole_patches(vit, case.inputs["image"]))
    maps = features.maps
    if config["get_embeddings"] and len(out_indices) == 1:
        maps = [F.normalize(features.extras["dense"], dim=1)]
    outputs = {f"feature_{number}": value for number, value in enumerate(maps)}
    if config["get_embeddings"]:
        assert features.pooled is not None
        outputs["global_embedding"] = F.normalize(features.pooled, dim=-1)
    return outputs


@torch.no_grad()
def denseclip_resnet(case: Case) -> dict[str, Tensor]:
    features = resnet_of(case.config, case.weights)(case.inputs["image"])
    assert features.pooled is not None
    stages = {f"layer{number}": value for number, value in enumerate(features.maps, start=1)}
    return stages | {"global": features.pooled, "local": features.extras["dense"]}


def denseclip_text(case: Case) -> dict[str, Tensor]:
    """Gradients of the outputs weighted by -1 to 1 in their order, as the case of the context decoder says."""
    config, tokens = case.config, case.inputs["tokens"].long()
    assert torch.equal(tokenize(config["class_names"], context_length=config["text_tokens"]), tokens)
    contexts = case.inputs["contexts"].clone().requires_grad_()  # (B, n, D), or (1, n, D) for all images
    tower = text_of(config, case.weights)
    words = insert_context(tower.embed(tokens), contexts[:, None])  # (B, K, L, D)
    embeddings = tower.encode(words, end_positions(tokens) + contexts.shape[1])
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    assert contexts.grad is not None
    return {"text_embeddings": embeddings.detach(), "grad.contexts": contexts.grad}


CLIP: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("clip", "tokenizer"): tokenizer,
    ("clip", "vit_towers"): towers,
    ("clip", "resnet_towers"): towers,
    ("zegclip", "text_encoder"): zegclip_text,
    ("zegclip", "plain_encoder"): zegclip_plain_encoder,
    ("denseclip", "clip_resnet"): denseclip_resnet,
    ("denseclip", "text_context_encoder"): denseclip_text,
}
