"""Builders of our counterparts to the golden cases, by (system, kind).

A builder makes the part from the case's config, loads the official weights through `convert`, runs it on the case's
inputs and returns the outputs under the official names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT
from segvit.contracts import Batch, Dense
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.schedule import learning_rate
from segvit.systems import segmenter, segvit
from tests.golden.run import Case
from tests.golden_castformer import CASTFORMER
from tests.golden_cavpt import CAVPT
from tests.golden_clip import CLIP
from tests.golden_conv_adapter import CONV_ADAPTER
from tests.golden_ddrnet import DDRNET
from tests.golden_denseclip import DENSECLIP
from tests.golden_duat import DUAT
from tests.golden_few_shot import FEW_SHOT
from tests.golden_frpt import FRPT
from tests.golden_ftn import FTN
from tests.golden_hlg import HLG
from tests.golden_medical import MEDICAL
from tests.golden_mmseg import MMSEG, optim_settings, schedule_settings
from tests.golden_pvt import PVT_CASES
from tests.golden_setr import SETR
from tests.golden_ssf import SSF
from tests.golden_svf import SVF
from tests.golden_vpt import VPT
from tests.golden_zegclip import ZEGCLIP
from tests.golden_zsseg import ZSSEG


def load(module: nn.Module, state: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """Load a converted state dict (the part under `prefix`), every key used and none missing."""
    module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    return module.eval()


def mmseg_vit(config: dict[str, Any]) -> PlainViT:
    """mmseg 0.24's VisionTransformer, as SegViT's configurations use it."""
    trunk = VisionTransformer(
        img_size=segvit.as_size(config["img_size"]), patch_size=config["patch_size"], in_chans=config["in_channels"],
        embed_dim=config["embed_dims"], depth=config["num_layers"], num_heads=config["num_heads"], num_classes=0,
        mlp_ratio=config.get("mlp_ratio", 4), qkv_bias=config.get("qkv_bias", True), final_norm=False,
    )  # fmt: skip
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config["norm_cfg"].get("eps", 1e-5)
    trunk.pretrained_cfg = {}
    final = config.get("final_norm", False)
    return PlainViT(trunk, out_indices=config["out_indices"], prefix_tokens="drop", final_norm=final)


def segvit_model(config: dict[str, Any], weights: dict[str, Tensor], *, fixed: bool = True) -> nn.Module:
    """Official (Shrunk) SegViT from its mmseg configuration, with the official weights converted."""
    backbone, head = config["backbone"], config["decode_head"]
    canvas = segvit.as_size(head["img_size"])
    vit = mmseg_vit(backbone)
    common: dict[str, Any] = {"num_classes": head["num_classes"], "heads": head["num_heads"], "dropout": 0.0}
    common["layers"] = head["num_layers"]
    dim = head["embed_dims"]
    model: nn.Module
    if head["type"] == "TPNATMHead":
        side = canvas[0] // head.get("shrink_ratio", 16)
        part = segvit.ShrunkHead(head["in_channels"], dim, stages=head["use_stages"], grid=(side, side),
                                 fixed_queries=fixed, **common)  # fmt: skip
        model = segvit.ShrunkSegViT(vit, part, shrink_at=backbone["shrink_idx"], fixed_masks=canvas if fixed else None)
    else:
        use_proj = head.get("use_proj", True)
        cascade = segvit.ATMHead(head["in_channels"], dim, stages=head["use_stages"], use_proj=use_proj, **common)
        model = segvit.SegViT(vit, cascade, fixed_masks=canvas if fixed else None)
    return load(model, segvit.convert(weights))


def official_names(out: Dense, canvas: tuple[int, int] | None) -> dict[str, Tensor]:
    """SegViT's extras under the names of the official head's output dict."""
    named = {"pred_logits": out.extras["class_logits"]}
    for key, value in out.extras.items():
        if key.startswith("aux"):
            named[key.replace("class_logits", "pred_logits").replace("_masks", "_pred_masks")] = value
    if canvas is not None:
        named["pred_masks"] = F.interpolate(out.extras["masks"], size=canvas, mode="bilinear", align_corners=False)
    return named


def atm_head(case: Case) -> dict[str, Tensor]:
    config = case.config
    head = segvit.ATMHead(
        config["in_channels"], config["embed_dims"], num_classes=config["num_classes"], heads=config["num_heads"],
        layers=config["num_layers"], stages=config["use_stages"], dropout=0.0, use_proj=config.get("use_proj", True),
    )  # fmt: skip
    weights = {k if k.startswith("decode_head.") else f"decode_head.{k}": v for k, v in case.weights.items()}
    load(head, segvit.convert(weights), "head.")
    tokens = [case.inputs[f"tok{i}"] for i in range(len(case.inputs))][: config["use_stages"]]
    # The official head takes the first of an odd number of tokens for a class token.
    maps = [segvit.square(t[:, t.shape[1] % 2 :].mT[..., None]) for t in tokens]
    canvas = segvit.as_size(config["img_size"])
    out = segvit.dense_output(head(maps), covers=canvas, size=canvas, fixed=canvas)
    return official_names(out, canvas) | {"pred": out.extras["canvas"]}


def atm_loss(case: Case) -> dict[str, Tensor]:
    config = case.config
    named = {k: v.clone().requires_grad_() for k, v in case.inputs.items() if k != "label"}
    extras = {k.replace("pred_logits", "class_logits").replace("pred_masks", "masks"): v for k, v in named.items()}
    label = case.inputs["label"]
    out = Dense(extras["masks"], extras, (label.shape[-2], label.shape[-1]))
    ignore = config["ignore_index"]
    totals = segvit.normalisers(label, num_classes=config["num_classes"], ignore_index=ignore)
    scale = config.get("loss_weight", 1.0)
    losses = segvit.criterion(
        out, label, totals, ignore_index=ignore, class_weight=scale * config["cls_weight"],
        mask_weight=scale * config["mask_weight"], dice_weight=scale * config["dice_weight"],
        no_object=config["eos_coef"], alpha=config["focal_alpha"], gamma=config["focal_gamma"],
    )  # fmt: skip
    # Terms beyond the weight table, which ends at dec_layers - 2, are dropped.
    losses = {k: v for k, v in losses.items() if not k[-1].isdigit() or int(k[-1]) < config["dec_layers"] - 1}
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = {f"grad_{name}": value.grad for name, value in named.items() if value.grad is not None}
    return {name: value.detach() for name, value in losses.items()} | {"total": total.detach()} | gradients


@torch.no_grad()
def whole(case: Case) -> dict[str, Tensor]:
    """Image -> scores at the input size, plain and Shrunk."""
    model = segvit_model(case.config, case.weights)
    image = case.inputs["image"]
    out = model(image)
    size = (image.shape[-2], image.shape[-1])
    scores = segvit.scores(out, size, range(size[0]))
    if isinstance(model, segvit.ShrunkSegViT):
        tokens = [m.flatten(2).mT for m in model.shrunk_features(image).maps]
    else:
        tokens = model.backbone(image).maps
    named = {"head_pred": out.extras["canvas"], "logits": scores, "softmax": scores.softmax(1)}
    return named | official_names(out, None) | {f"tokens{i}": t for i, t in enumerate(tokens)}


def trajectory(case: Case) -> dict[str, Tensor]:
    """Training iterations in fp32 (everything) and fp64 (losses), through the training loop itself."""
    single, double = _train(case, torch.float32), _train(case, torch.float64)
    return single | {k.replace("step.", "step64."): v for k, v in double.items() if k.startswith("step.")}


def _train(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    config = case.config
    model = segvit_model(config["model"], case.weights, fixed=True).to(dtype)
    names = {new: old for old, new in _renamed(case.weights).items()}  # ours -> official
    official = [(names[name], parameter) for name, parameter in model.named_parameters()]
    schedule = schedule_settings(config["lr_config"])
    optim = optim_settings(config["optimizer"])
    parameters = parameter_rates(official, optim)
    optimizer = make_optimizer(parameters, optim)
    loss_config = config["model"]["decode_head"]["loss_decode"]
    log: dict[str, list[float]] = {}
    outputs: dict[str, Tensor] = {}
    seen: list[Dense] = []
    model.register_forward_hook(lambda module, inputs, out: seen.append(out))

    def note_gradients(*_: Any) -> None:
        if len(seen) == 1:
            outputs.update({f"grad0.{name}": p.grad.clone() for name, p in official if p.grad is not None})

    def note(row: dict[str, Any]) -> None:
        labels, out = case.inputs["label"][row["step"] - 1], seen[-1]
        scores = segvit.scores(out, labels.shape[-2:], range(labels.shape[-2]))
        right = (scores.argmax(1) == labels)[labels != config["ignore_index"]]
        values = {name: value for name, value in row.items() if name.startswith("loss") or name == "grad_norm"}
        for name, value in (values | {"acc_seg": 100 * right.float().mean().item()}).items():
            log.setdefault(f"step.{name}", []).append(value)

    optimizer.register_step_pre_hook(note_gradients)
    ignore = config["ignore_index"]
    procedure = Procedure(
        criterion=partial(segvit.criterion, ignore_index=ignore), schedule=schedule, steps=config["max_iters"],
        normalisers=partial(segvit.normalisers, num_classes=loss_config["num_classes"], ignore_index=ignore),
        clip=config["grad_clip"]["max_norm"] if config["grad_clip"] else None,
    )  # fmt: skip
    images, labels = case.inputs["image"], case.inputs["label"]
    batches = ([Batch(images[i].to(dtype), labels[i], [str(i)])] for i in range(config["steps"]))
    with suppress(StopIteration):  # the schedule is longer than what was recorded
        fit(
            model, optimizer, batches, procedure=procedure, accelerator=Accelerator(cpu=True), progress=Progress(),
            average=None, report=note, after=lambda step: None,
        )  # fmt: skip
    outputs |= {name: torch.tensor(values, dtype=torch.float64) for name, values in log.items()}
    rates = {rate.name: rate.lr for rate in parameters}
    outputs["lr"] = torch.tensor(
        [
            [learning_rate(schedule, i, base=rates[name], steps=config["max_iters"]) for name in config["lr_columns"]]
            for i in range(config["steps"])
        ],
        dtype=torch.float64,
    )
    return outputs | {f"final.{name}": p.detach() for name, p in official}


def _renamed(weights: dict[str, Tensor]) -> dict[str, str]:
    """Official key -> our key, found by sending numbered tensors through `convert`."""
    keys = list(weights)
    converted = segvit.convert({key: torch.tensor(i) for i, key in enumerate(keys)})
    return {keys[int(number)]: new for new, number in converted.items()}


def mask_transformer(case: Case) -> dict[str, Tensor]:
    config = case.config
    decoder = segmenter.MaskTransformer(
        config["d_encoder"], config["d_model"], num_classes=config["n_cls"], layers=config["n_layers"],
        heads=config["n_heads"], hidden=config["d_ff"],
    )  # fmt: skip
    weights = {k if k.startswith("decoder.") else f"decoder.{k}": v for k, v in case.weights.items()}
    load(decoder, segmenter.convert(weights), "decoder.")
    tokens = case.inputs["tokens"]
    patch = config["patch_size"]
    height, width = (-(-side // patch) for side in config["image_hw"])  # padded to whole patches
    with torch.no_grad():
        masks = decoder(tokens).unflatten(2, (height, width))
    padded = F.interpolate(masks, size=(height * patch, width * patch), mode="bilinear", align_corners=False)
    return {"masks": masks, "logits_image_size": padded[..., : config["image_hw"][0], : config["image_hw"][1]]}


BUILDERS: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("segvit", "atm_head"): atm_head,
    ("segvit", "atm_loss"): atm_loss,
    ("segvit", "whole"): whole,
    ("segvit", "shrunk"): whole,
    ("segvit", "trajectory"): trajectory,
    ("segvit", "trajectory_shrunk"): trajectory,
    ("segmenter", "mask_transformer"): mask_transformer,
    **CASTFORMER,
    **CAVPT,
    **CLIP,
    **CONV_ADAPTER,
    **DDRNET,
    **DENSECLIP,
    **DUAT,
    **FEW_SHOT,
    **FRPT,
    **FTN,
    **HLG,
    **MEDICAL,
    **MMSEG,
    **PVT_CASES,
    **SETR,
    **SSF,
    **SVF,
    **VPT,
    **ZEGCLIP,
    **ZSSEG,
}
