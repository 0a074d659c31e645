"""Builders of our counterparts to the golden cases of zsseg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.backbones.vit import PlainViT
from segvit.contracts import Size
from segvit.losses.matching import Targets, Terms, match, set_losses
from segvit.metrics.confusion import ConfusionMatrix
from segvit.metrics.open_vocabulary import open_vocabulary
from segvit.nn.mask_queries import PixelDecoder, QueryDecoder
from segvit.nn.readout import mix_masks
from segvit.systems import zsseg
from segvit.tasks.pseudo_labels import pseudo_labels as unseen_labels
from segvit.text.embeddings import class_sentences, embed_sentences
from segvit.text.prompt import LearnedPrompt, convert_prompt
from segvit.text.tokenize import tokenize
from tests.golden.run import Case
from tests.golden_clip import resnet_of, text_of, vit_of

CLIP = "clip_model."


def converted(weights: dict[str, Tensor], place: str, prefix: str) -> dict[str, Tensor]:
    """A part's official weights through `convert`, which knows them by their `place` in a whole checkpoint."""
    state = zsseg.convert({f"{place}{key}": value for key, value in weights.items()})
    return {key.removeprefix(prefix): value for key, value in state.items()}


@torch.no_grad()
def pixel_decoder(case: Case) -> dict[str, Tensor]:
    config = case.config
    decoder = PixelDecoder(config["in_channels"], config["conv_dim"], config["mask_dim"])
    decoder.load_state_dict(converted(case.weights, "sem_seg_head.pixel_decoder.", "pixel_decoder."))
    maps = [case.inputs[name] for name in sorted(case.inputs)]  # res2, the finest, to res5
    return {"mask_features": decoder.eval()(maps)}


@torch.no_grad()
def query_predictor(case: Case) -> dict[str, Tensor]:
    config = case.config
    assert not config.get("enc_layers")
    assert not config.get("pre_norm")
    decoder = QueryDecoder(
        config["in_channels"], config["hidden_dim"], queries=config["num_queries"], layers=config["dec_layers"],
        heads=config["nheads"], hidden=config["dim_feedforward"], mask_dim=config["mask_dim"],
        embed_dim=config["embedding_dim"], embed_hidden=config["embed_hidden_dim"],
        embed_layers=config["embed_layers"],
    )  # fmt: skip
    decoder.load_state_dict(converted(case.weights, "sem_seg_head.predictor.", "decoder."))
    outputs = decoder.eval()(case.inputs["features"], case.inputs["mask_features"])
    named: dict[str, Tensor] = {}
    if config.get("deep_supervision", True):
        for index, (embeddings, masks) in enumerate(outputs[:-1]):
            named |= {f"aux{index}_embeddings": embeddings, f"aux{index}_masks": masks}
    return named | {"query_class_embeddings": outputs[-1][0], "pred_masks": outputs[-1][1]}


def set_criterion(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    batch = config["batch"]
    named = {key: value.clone().requires_grad_() for key, value in inputs.items() if key.endswith(("logits", "masks"))}
    counts = [len(inputs[f"labels_{image}"]) for image in range(batch)]
    maps = torch.cat([inputs[f"target_masks_{image}"] for image in range(batch)])  # one binary map each
    numbers = torch.arange(sum(counts))
    targets = Targets(
        maps, torch.stack([numbers, torch.ones_like(numbers)], 1),
        torch.arange(batch).repeat_interleave(torch.tensor(counts)),
        torch.cat([inputs[f"labels_{image}"] for image in range(batch)]),
    )  # fmt: skip
    totals = {"images": torch.tensor(batch), "present": torch.tensor(sum(counts))}
    covers: Size = (maps.shape[-2], maps.shape[-1])
    weights = Terms(config["class_weight"], config["mask_weight"], config["dice_weight"])
    focal: dict[str, Any] = {"alpha": config["focal_alpha"], "gamma": config["focal_gamma"], "covers": covers}
    losses: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for source, suffix in [("", "")] + [(f"aux{i}_", f"_{i}") for i in range(config["aux_layers"])]:
        layer = named[f"{source}logits"], named[f"{source}masks"]
        matches = match(*layer, targets, costs=Terms(**config["matching_costs"]), **focal)
        found = set_losses(
            *layer, targets, matches, totals, weights=weights, no_object=config["no_object_weight"], **focal
        )  # fmt: skip
        losses |= {f"loss_{name}{suffix}": value for name, value in found.items()}
        if not source:
            for image, (queries, chosen) in enumerate(matches):
                outputs |= {f"match_query_{image}": queries, f"match_target_{image}": chosen}
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = {f"grad.{name}": value.grad for name, value in named.items() if value.grad is not None}
    return outputs | gradients | {"total": total.detach()} | {key: value.detach() for key, value in losses.items()}


def sparse_text(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The text tower of a zsseg case, whose sizes are not all in its configuration."""
    own = {key.removeprefix(CLIP): value for key, value in weights.items() if key.startswith(CLIP)}
    positions = own["positional_embedding"]
    return text_of({"vocab_size": 49408, "context_length": len(positions)} | config, own)


def learned_prompt(config: dict[str, Any], weights: dict[str, Tensor]) -> LearnedPrompt:
    prefix, suffix = config["prompt_shape"]
    prompt = LearnedPrompt(config["text_width"], prefix=prefix, suffix=suffix)
    prompt.load_state_dict(convert_prompt(weights))
    return prompt


def learnable_prompt(case: Case) -> dict[str, Tensor]:
    config, weights = case.config, case.weights
    tower, prompt = sparse_text(config, weights), learned_prompt(config, weights)
    if "class_name_tokens" in case.inputs:
        assert torch.equal(tokenize(config["class_names"]), case.inputs["class_name_tokens"].long())
    features = prompt(tower, config["class_names"])
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    named = dict(prompt.named_parameters())
    gradients = {f"grad.{name}_prompt": value.grad for name, value in named.items() if value.grad is not None}
    return {"text_features": features.detach(), **gradients}


def image_tower(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The image tower of a zsseg case, under the names that `convert` gives it in a whole checkpoint."""
    visual = {
        key.removeprefix(f"{CLIP}visual."): value for key, value in weights.items() if key.startswith(f"{CLIP}visual.")
    }
    common = {
        "layers": config["vision_layers"], "width": config["vision_width"], "output_dim": config["embed_dim"],
        "input_resolution": config["image_resolution"],
    }  # fmt: skip
    if isinstance(config["vision_layers"], list):
        heads = config.get("vision_attn_heads", config.get("vision_heads", config["vision_width"] * 32 // 64))
        return resnet_of(common | {"attnpool_heads": heads}, visual)
    heads = config.get("vision_heads", config["vision_width"] // 64)
    tower: PlainViT = vit_of(common | {"heads": heads, "patch_size": config["patch"]}, visual)
    tower.load_state_dict(converted(weights, "clip_adapter.", "regions.tower."), strict=False)
    return tower


@torch.no_grad()
def region_classification(case: Case) -> dict[str, Tensor]:
    config, weights, inputs = case.config, case.weights, case.inputs
    text = sparse_text(config, weights)
    if config["prompt"] == "learnable":
        words = learned_prompt(config, weights)(text, config["class_names"])
    else:
        templates = config.get("templates", config["prompt"])
        words = embed_sentences(text, class_sentences(config["class_names"], templates=templates))
    nothing = converted(weights, "clip_adapter.", "")["no_object"]
    candidates = torch.cat([words, F.normalize(nothing, dim=-1)])
    regions = zsseg.RegionClassifier(
        image_tower(config, weights), side=config.get("region_size", 224), threshold=config["mask_thr"],
        expand=config["mask_expand_ratio"], fill=config["mask_fill"], soft=config["mask_matting"],
    )  # fmt: skip
    image, masks = inputs["image"] / 255, inputs["mask_logits"].sigmoid()
    crops, valid = regions.crops(image, masks)
    vectors, _ = regions(image, masks)
    clip_logits = zsseg.cosine_logits(vectors, candidates)
    queries = inputs["mask_class_logits"].softmax(-1)[:, :-1]
    opinion = clip_logits[:, :-1].softmax(-1)
    seen = torch.tensor(config["trainable_flag"], dtype=torch.bool)

    def semantic(flags: Tensor, weight: float) -> Tensor:
        return mix_masks(zsseg.fuse(queries, opinion, valid, seen=flags, weight=weight)[None], masks[None])[0]

    ensembles = config["ensemble_weights"]
    return {
        "clip_logits": clip_logits, "region_features": vectors, "text_features": candidates,
        "normalised_query_logits": zsseg.cosine_logits(inputs["query_embeddings"], candidates),
        "regions_crop": crops[:, :, ::16, ::16], "regions_mean_per_channel": crops.mean((2, 3)),
        "valid": valid.to(torch.uint8), "semantic_map_no_clip": mix_masks(queries[None], masks[None])[0],
        "semantic_map_no_flag": semantic(torch.zeros_like(seen), ensembles[0]),
        **{f"semantic_map_w{weight}": semantic(seen, weight) for weight in ensembles},
    }  # fmt: skip


def pseudo_labels(case: Case) -> dict[str, Tensor]:
    config = case.config
    labels = unseen_labels(
        case.inputs["semantic_map"], case.inputs["labels"] if config["with_prior"] else None,
        seen=torch.tensor(config["trainable_flag"], dtype=torch.bool), rejected=config["num_classes"],
        least=config["reject_threshold"],
    )  # fmt: skip
    return {"pseudo_labels": labels}


def hiou_metric(case: Case) -> dict[str, Tensor]:
    config = case.config
    classes = config["num_classes"]
    predictions, labels = (case.inputs[name].numpy() for name in ("predictions", "labels"))
    matrix = ConfusionMatrix(classes, config["ignore"])
    matrix.update(predictions, labels)
    full = ConfusionMatrix(classes + 1, -1)  # ignored pixels too, as a class of their own
    full.update(predictions, np.where(labels == config["ignore"], classes, labels))
    metrics = matrix.metrics()
    groups = open_vocabulary(metrics, unseen=sorted(set(range(classes)) - set(config["seen"])))
    iou = np.where(metrics.pixels > 0, metrics.iou, np.nan)  # there a class without labels has none
    values = {
        "fwIoU": metrics.fwiou, "mACC": metrics.macc, "mIoU": metrics.miou, "pACC": metrics.aacc,
        "mIoU_seen": groups.seen, "mIoU_unseen": groups.unseen, "hIoU": groups.harmonic,
    }  # fmt: skip
    outputs = {name: torch.tensor(100 * value, dtype=torch.float64) for name, value in values.items()}
    return outputs | {
        "confusion_pred_by_gt": torch.from_numpy(full.matrix.T.copy()),
        "iou_per_class_percent": torch.from_numpy(100 * iou),
    }


ZSSEG: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("zsseg", "pixel_decoder"): pixel_decoder,
    ("zsseg", "query_predictor"): query_predictor,
    ("zsseg", "set_criterion"): set_criterion,
    ("zsseg", "learnable_prompt"): learnable_prompt,
    ("zsseg", "region_classification"): region_classification,
    ("zsseg", "pseudo_labels"): pseudo_labels,
    ("zsseg", "hiou_metric"): hiou_metric,
}
