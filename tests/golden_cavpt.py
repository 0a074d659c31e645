"""Builders of our counterparts to the golden cases of DPT with CAVPT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from segvit.adapters.cavpt import PromptGenerator, TextPrompts
from segvit.backbones.clip import Towers, clip_vit
from segvit.systems import dpt_clip
from segvit.text.architecture import TextConfig, VisionConfig
from segvit.text.tower import TextTower
from tests.golden.run import Case

EXTRACTOR, OURS = "image_encoder.transformer.extractor.", "visual_prompts.generator."


def ramp(values: Tensor, *, first: float = -1) -> Tensor:
    """The cases' objective: the sum of the values, weighted from `first` to its opposite in their order."""
    return (values * torch.linspace(first, -first, values.numel()).view_as(values)).sum()


def text_tower(config: dict[str, Any], weights: dict[str, Tensor]) -> TextTower:
    return TextTower(
        TextConfig(
            width=config["text_width"], layers=config["text_layers"], heads=config["text_heads"],
            embed_dim=config["embed_dim"], context_length=len(weights["text_encoder.positional_embedding"]),
        )
    )  # fmt: skip


def text_options(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "context": config["n_text_ctx"], "position": config.get("position", "end"),
        "class_specific": config.get("csc", False),
    }  # fmt: skip


def load_part(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Every key of a part used and none missing, besides our count of steps and the token table (not stored)."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing, unexpected = module.load_state_dict(own, strict=False)
    assert {*missing} <= {"token_embedding.weight", "text.token_embedding.weight", "steps"}, missing
    assert not unexpected, unexpected


def generator(case: Case) -> dict[str, Tensor]:
    config, weights = case.config, case.weights
    official = {f"{EXTRACTOR}{key}": key for key in weights}
    part = PromptGenerator(
        config["vision_layers"] - config["bottom_limit"] + 1, config["vision_width"], config["embed_dim"],
        num_classes=len(config["class_names"]), key_dim=config.get("key_dim", 32),
        extra_keys=config.get("n_extra_keys", 10),
    )  # fmt: skip
    load_part(part, dpt_clip.convert({key: weights[short] for key, short in official.items()}), OURS)
    text = case.inputs["text_features"].clone().requires_grad_()
    out = part(config["layer_slot"], case.inputs["image_tokens"].transpose(0, 1), text)
    prompts, logits = out.prompts.transpose(0, 1), out.logits.transpose(0, 1)
    (ramp(prompts) + ramp(logits, first=1)).backward()
    assert text.grad is not None
    gradients = official_gradients(part, official, OURS)
    return {
        "class_aware_prompts": prompts.detach(), "aux_logits": logits.detach(), "attention": out.attention.detach(),
        "grad.text": text.grad, **{f"grad.{official[key]}": value for key, value in gradients.items()},
    }  # fmt: skip


def official_gradients(model: nn.Module, keys: Iterable[str], prefix: str = "") -> dict[str, Tensor]:
    """Gradients of all prompts under their official names, found by sending numbers through `convert`."""
    official = [key for key in keys if "ctx" in key or EXTRACTOR in key]
    numbers = dpt_clip.convert({key: torch.tensor(index) for index, key in enumerate(official)})
    parameters = {f"{prefix}{name}": parameter for name, parameter in model.named_parameters()}
    trained = {official[int(n)]: parameters[name] for name, n in numbers.items() if name in parameters}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def text_prompt(case: Case) -> dict[str, Tensor]:
    config = case.config
    tower = text_tower(config, case.weights)
    prompts = TextPrompts(tower, config["class_names"], **text_options(config))
    state = dpt_clip.convert(case.weights)
    load_part(tower, state, "text.")
    load_part(prompts, state, "text_prompts.")
    features = prompts(tower)
    ramp(features).backward()
    assert prompts.context.grad is not None
    return {
        "grad.ctx": prompts.context.grad, "prompts_first24": prompts.embeddings()[:, :24].detach(),
        "text_features": features.detach(), "tokenized_prompts": prompts.tokens,
    }  # fmt: skip


def full_model(case: Case) -> dict[str, Tensor]:
    config = case.config
    side = config["image_size"]
    vit = clip_vit(
        VisionConfig(
            width=config["vision_width"], layers=config["vision_layers"], heads=config["vision_heads"],
            embed_dim=config["embed_dim"], image_size=side, patch_size=config["patch"],
        ),
        image_size=(side, side),
    )  # fmt: skip
    model = dpt_clip.DualPromptClip(
        Towers(vit, text_tower(config, case.weights), 0.0), config["class_names"], length=config["n_visual_ctx"],
        class_prompts=config["cpn"], bottom_limit=config["bottom_limit"], key_dim=config.get("key_dim", 32),
        extra_keys=config.get("n_extra_keys", 10), **text_options(config),
    )  # fmt: skip
    load_part(model.eval(), dpt_clip.convert(case.weights), "")
    labels, general = case.inputs["labels"].long(), config.get("general_knowledge_epochs", 30)
    outputs: dict[str, Tensor] = {}
    for phase, epoch in (("early", general - 1), ("late", general)):
        model.zero_grad()
        out = model.outputs(case.inputs["image"])
        terms = dpt_clip.losses(out, labels, epoch=epoch, general_epochs=general, class_weight=config["alpha"])
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        outputs[f"loss_{phase}"] = loss.detach()
        outputs |= {f"grad_{phase}.{key}": g for key, g in official_gradients(model, case.weights).items()}
    return outputs | {
        "logits": out.logits.detach(), "logits_zeroshot_image_vs_learned_text": out.text_logits.detach(),
        "logits_learned_image_vs_handcrafted_text": out.image_logits.detach(), "top_indices": out.selected,
        "aux_logits": out.class_logits.permute(1, 2, 0, 3).detach(),  # block, prompt, image, class
    }  # fmt: skip


CAVPT: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("dpt_cavpt", "generator"): generator,
    ("dpt_cavpt", "text_prompt"): text_prompt,
    ("dpt_cavpt", "full_model"): full_model,
}
