"""Builders of our counterparts to the golden cases of ZegCLIP, besides those of its towers alone (golden_clip)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.clip import clip_vit
from segvit.backbones.vit import PlainViT
from segvit.contracts import Classes, Dense, InputSpec
from segvit.inference.windows import WindowedScores
from segvit.systems import zegclip
from segvit.text.architecture import VisionConfig
from segvit.text.embeddings import class_embeddings
from tests.golden.run import Case
from tests.golden_clip import text_of, whole_patches

IGNORE = 255


def load(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """The part of an official state dict that becomes `prefix`, every key used and none missing."""
    own = {k.removeprefix(prefix): v for k, v in zegclip.convert(state).items() if k.startswith(prefix)}
    if not any(key.startswith("embedding.joint.") for key in own):  # an encoder without the joint space
        own = {k: v for k, v in module.state_dict().items() if k.startswith("embedding.joint.")} | own
    module.load_state_dict(own)


def prompted_vit(config: dict[str, Any], weights: dict[str, Tensor], out_indices: Sequence[int] = (-1,)) -> PlainViT:
    side = config["input_resolution"]
    vit = clip_vit(
        VisionConfig(
            width=config["width"], layers=config["layers"], heads=config["heads"], embed_dim=config["output_dim"],
            image_size=side, patch_size=config["patch_size"],
        ),
        image_size=(side, side), out_indices=out_indices, position_mode="bilinear", doubled_class=True,
    )  # fmt: skip
    zegclip.add_prompts(vit, num_prompts=config["num_tokens"], deep=config["total_d_layer"], dropout=0.0)
    load(vit, weights, "backbone.")
    return vit.eval()


def mask_head(config: dict[str, Any], weights: dict[str, Tensor]) -> zegclip.MaskHead:
    head = zegclip.MaskHead(
        config["dim"], layers=config["num_layers"], heads=config["num_heads"], dropout=0.0,
        use_proj=config.get("use_proj", False),
    )  # fmt: skip
    load(head, weights, "head.")
    return head.eval()


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


@torch.no_grad()
def vpt_encoder(case: Case) -> dict[str, Tensor]:
    config, wanted = case.config, case.config["out_indices"]
    taken = sorted({*wanted, config["layers"] - 1})
    vit = prompted_vit(config, prefixed(case.weights, "backbone."), taken)
    features = vit(whole_patches(vit, case.inputs["image"]))
    maps = [features.maps[taken.index(index)] for index in wanted]
    if config["get_embeddings"] and len(wanted) == 1:
        maps = [F.normalize(features.extras["dense"], dim=1)]
    outputs = {f"feature_{number}": value for number, value in enumerate(maps)}
    if config["get_embeddings"]:
        assert features.pooled is not None
        outputs["global_embedding"] = F.normalize(features.pooled, dim=-1)
    return outputs


def seen_of(count: int, ids: Sequence[int]) -> Tensor:
    seen = torch.zeros(count, dtype=torch.bool)
    seen[list(ids)] = True
    return seen


def head_output(
    case: Case, head: zegclip.MaskHead, patches: Tensor, *, seen: Tensor, seen_bias: float = 0.0
) -> Dense:  # fmt: skip
    inputs, side = case.inputs, case.config["img_size"]
    masks = head(inputs["cls_embedding"], patches, inputs["text_embeddings"])
    return zegclip.dense_output(masks, seen, seen_bias=seen_bias, covers=(side, side))


def full_scores(out: Dense) -> Tensor:
    return zegclip.READOUT(out, out.covers, range(out.covers[0]))


@torch.no_grad()
def head_eval(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    head = mask_head(config, prefixed(case.weights, "decode_head."))
    seen = seen_of(len(inputs["text_embeddings"]), config["seen_idx"])
    out = partial(head_output, case, head, inputs["patch_features"], seen=seen)
    return {
        "pred_inductive": full_scores(out(seen_bias=config.get("seen_bias_inductive", 0.1))),
        "pred_transductive": full_scores(out()),
        "relationship_queries": head.queries(inputs["cls_embedding"], inputs["text_embeddings"]),
    }


def official_gradients(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our gradients under the official names: where the elements of each official tensor went, `convert` says."""
    names = list(weights)
    numbers = {name: torch.full_like(weights[name], number, dtype=torch.long) for number, name in enumerate(names)}
    places = {key.removeprefix(prefix): value for key, value in zegclip.convert(numbers).items()}
    gradients = {}
    for key, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        for number in places[key].unique().tolist():
            gradients[names[number]] = parameter.grad[places[key] == number].view(weights[names[number]].shape)
    return gradients


def losses(
    out: Dense, labels: Tensor, config: dict[str, Any], *, self_training: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The criterion's terms, the mask logits that are trained, at the size of labels, and the labels trained on."""
    seen = out.extras["seen"][0]
    masks = labels[:, 0]
    totals = zegclip.normalisers(masks, num_classes=len(seen), ignore_index=IGNORE)
    terms = zegclip.criterion(
        out, masks, totals, ignore_index=IGNORE, setting="transductive" if self_training else "inductive",
        focal_weight=config["mask_weight"], dice_weight=config["dice_weight"],
        alpha=config.get("focal_alpha", 0.25), gamma=config.get("focal_gamma", 2.0),
    )  # fmt: skip
    full = F.interpolate(out.extras["masks"], size=masks.shape[-2:], mode="bilinear", align_corners=False)
    final = zegclip.training_labels(out, masks, ignore_index=IGNORE, self_training=self_training)
    trained = full if self_training else full[:, seen]
    if not self_training:  # the official numbers of the seen classes among themselves
        table = torch.full((IGNORE + 1,), IGNORE)
        table[: len(seen)][seen] = torch.arange(int(seen.sum()))
        final = table[final]
    return terms, trained, final


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """mmseg's, in percent of the pixels that are not ignored."""
    valid = labels != IGNORE
    return 100 * (logits.argmax(1) == labels)[valid].float().mean().reshape(1)


def head_losses(case: Case, *, self_training: bool) -> dict[str, Tensor]:
    """Labels hold -1 where the class is unseen; in self-training any unseen class may stand there."""
    config, weights = case.config, prefixed(case.weights, "decode_head.")
    head = mask_head(config, weights)
    count = len(case.inputs["text_embeddings"])
    seen = seen_of(count, config["seen_idx"] if self_training else range(count))
    unknown = int((~seen).nonzero()[0]) if self_training else IGNORE
    labels = torch.where(case.inputs["labels"] == -1, unknown, case.inputs["labels"])
    patches = case.inputs["patch_features"].clone().requires_grad_()
    out = head_output(case, head, patches, seen=seen)
    terms, masks, final = losses(out, labels, config, self_training=self_training)
    total = terms["loss_focal"] + terms["loss_dice"]
    total.backward()
    assert patches.grad is not None
    gradients = official_gradients(head, weights, "head.")
    return {
        "loss_mask": terms["loss_focal"], "loss_dice": terms["loss_dice"], "total": total, "pred_masks": masks,
        "acc_seg": accuracy(masks, final), "grad.patch_features": patches.grad,
        **{f"grad.{name.removeprefix('decode_head.')}": value for name, value in gradients.items()},
    }  # fmt: skip


def run(model: zegclip.ZegCLIP, image: Tensor) -> Dense:
    """The original sees whole patches only; what comes of them covers the image."""
    return model(whole_patches(model.backbone, image))._replace(covers=(image.shape[-2], image.shape[-1]))


class Runtime:
    """The model with the case's windows."""

    def __init__(self, model: zegclip.ZegCLIP, names: Sequence[str], config: dict[str, Any]) -> None:
        self.model, self.readout = model, zegclip.READOUT
        self.classes = Classes(tuple(names), tuple((i, i, i) for i in range(len(names))))
        self.spec = InputSpec(window=tuple(config["crop"]), stride=tuple(config["stride"]))

    def __call__(self, images: Tensor) -> Dense:
        return run(self.model, images)


def end_to_end(case: Case) -> dict[str, Tensor]:
    config, inputs, names = case.config, case.inputs, case.config["class_names"]
    text = {k.removeprefix("text_encoder."): v for k, v in case.weights.items() if k.startswith("text_encoder.")}
    tower = text_of(config["text_encoder"], text)
    words = class_embeddings(tower, names, templates=(config["template"],), cache=False)
    vit, head = prompted_vit(config["backbone"], case.weights), mask_head(config["decode_head"], case.weights)
    self_training = config["self_training"]
    model = zegclip.ZegCLIP(
        vit, head, words, unseen=config["novel_class"], seen_bias=0.0 if self_training else 0.1
    ).eval()  # fmt: skip
    terms, masks, final = losses(run(model, inputs["image"]), inputs["labels"], config["decode_head"],
                                 self_training=self_training)  # fmt: skip
    (terms["loss_focal"] + terms["loss_dice"]).backward()
    weights = {key: value for key, value in case.weights.items() if not key.startswith("text_encoder.")}
    gradients = official_gradients(model, weights, "")
    with torch.no_grad():
        view = WindowedScores(Runtime(model, names, config), inputs["large_image"][0])
        size, rescaled = view.size, tuple(config["rescale_to"])
        large = view.rows_at(rescaled, range(rescaled[0]))[None]
        whole = WindowedScores(view.run, inputs["large_image"][0]).rows(range(size[0]))[None]
        outputs = {
            "encode_decode": full_scores(run(model, inputs["image"])), "slide_map": whole, "slide_map_rescaled": large,
            "inference_softmaxed": large.softmax(1),
        }  # fmt: skip
    return outputs | {
        "decode.loss_mask": terms["loss_focal"], "decode.loss_dice": terms["loss_dice"],
        "decode.acc_seg": accuracy(masks, final), **{f"grad.{name}": value for name, value in gradients.items()},
    }  # fmt: skip


ZEGCLIP: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("zegclip", "vpt_encoder"): vpt_encoder,
    ("zegclip", "head_eval"): head_eval,
    ("zegclip", "loss_inductive"): partial(head_losses, self_training=False),
    ("zegclip", "loss_self_training"): partial(head_losses, self_training=True),
    ("zegclip", "end_to_end"): end_to_end,
}
