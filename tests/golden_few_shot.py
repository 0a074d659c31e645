"""Builders of our counterparts to the golden cases of few-shot segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segvit.adapters.svf import SingularValues, svf
from segvit.backbones.deep_stem import DeepStemResNet
from segvit.data.episodes import BENCHMARKS, benchmark_folds
from segvit.metrics.few_shot import EpisodeCounts
from segvit.systems import few_shot
from tests.golden.run import Case
from tests.golden_svf import gradient, official


def matcher(config: dict[str, Any]) -> few_shot.Matcher:
    backbone = DeepStemResNet(
        config["blocks"], stem=config["stem_channels"], planes=config["planes"],
        dilations=(config.get("dilation_layer3", 2), config.get("dilation_layer4", 4)),
    )  # fmt: skip
    stage = int(config.get("low_fea", "layer2").removeprefix("layer"))
    return few_shot.Matcher(backbone.requires_grad_(False), config["reduce_dim"], gram_stage=stage)


def meta_learner(config: dict[str, Any]) -> few_shot.MetaLearner:
    shot, hidden = config.get("shot", 1), config.get("kshot_trans_dim", 2)
    weights = few_shot.ShotWeights(shot, hidden) if shot > 1 else None
    return few_shot.MetaLearner(
        matcher(config),
        config["reduce_dim"],
        weights=weights,
        dilations=config.get("aspp_dilations", few_shot.DILATIONS),
    )


def episode(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.inputs["query_image"], case.inputs["support_images"], case.inputs["support_masks"]


@torch.no_grad()
def pfenet(case: Case) -> dict[str, Tensor]:
    model = few_shot.PFENet(matcher(case.config), case.config["reduce_dim"], bins=case.config["ppm_scales"])
    model.load_state_dict(few_shot.convert(case.weights))
    out = model.eval()(*episode(case))
    found = {"logits": out.logits, "query_layer4": out.extras["deepest"], "query_reduced": out.extras["query"],
             "support_prototype_mean": out.extras["prototype"]}  # fmt: skip
    for i in range(len(model.bins)):
        found[f"fem_inner_logits_bin{i}"] = out.extras[f"inner_{i}"]
        found[f"fem_input_bin{i}_prior"] = out.extras[f"prior_{i}"]
    shots = out.extras["prototypes"].unbind(1)
    return found | {f"masked_average_prototype_shot{i}": shot[..., None, None] for i, shot in enumerate(shots)}


@torch.no_grad()
def bam(case: Case) -> dict[str, Tensor]:
    config, meta = case.config, meta_learner(case.config)
    inputs, bins = meta.matcher.backbone.dims[-1], config.get("ppm_bins", few_shot.PSP_BINS)
    base = few_shot.BaseLearner(inputs, config["base_classes"], hidden=config["base_hidden"], bins=bins)
    model = few_shot.BAM(meta, base)
    model.load_state_dict(few_shot.convert(case.weights, ensemble=True))
    branch: list[Tensor] = []  # theirs has the shortcut of `res2_meta` outside of it
    meta.res2.layers.register_forward_hook(lambda module, inputs, out: branch.append(out))
    out = model.eval()(*episode(case))
    names = {"base_logits": "base", "init_merge_output": "merged", "meta_logits": "meta", "prior_mask": "prior",
             "query_reduced": "query", "support_prototype": "prototype"}  # fmt: skip
    found = {theirs: out.extras[ours] for theirs, ours in names.items()}
    return found | {"final_scores": out.logits, "res2_meta_output": branch[0]}


def svf_baseline(case: Case) -> dict[str, Tensor]:
    """The decomposed weights are put together, loaded, and decomposed by our SVF, which then gets the official factors.

    `meta_logits_before_tuning` is not produced: it belongs to singular values that the case does not store. Those of
    the tuned stages were multiplied by random numbers and only the products are in the file.
    """
    model = meta_learner(case.config)
    weights = case.weights
    plain = {name: value for name, value in weights.items() if ".conv_" not in name and "vector_S" not in name}
    layers = [name.removesuffix(".vector_S") for name in weights if name.endswith(".vector_S")]
    for name in layers:
        left, right = weights[f"{name}.conv_U.weight"].flatten(1), weights[f"{name}.conv_V.weight"]
        product = (left * weights[f"{name}.vector_S"].flatten()) @ right.flatten(1)
        plain[f"{name}.weight"] = product.view(-1, *right.shape[1:])
    model.load_state_dict(few_shot.convert(plain))
    backbone = model.eval().matcher.backbone
    handle = svf(backbone, layers=rf"^({'|'.join(case.config['trainable_stages'])})\.", official_rank=True)
    tuned = {change.path: change.new for change in handle.changes}
    for name, layer in tuned.items():
        assert isinstance(layer, SingularValues)
        official(layer, weights, name)
    out = model(*episode(case))
    target = case.inputs["query_mask"].long()
    totals = few_shot.normalisers(target, ignore_index=255)
    loss = torch.stack(list(few_shot.criterion(out, target, totals).values())).sum()
    loss.backward()
    counts = [parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad]
    found = {"meta_logits": out.logits, "loss": loss[None], "num_trainable_S": torch.tensor([sum(counts)])}
    for name, layer in tuned.items():
        assert isinstance(layer, SingularValues)
        found[f"grad.{name}.vector_S"] = gradient(layer)
    numbered = few_shot.convert({key: torch.tensor(i) for i, key in enumerate(plain)})  # ours -> number of theirs
    names = {ours: list(plain)[int(number)] for ours, number in numbered.items()}
    heads = {name: value for name, value in model.named_parameters() if not name.startswith("matcher.backbone.")}
    found |= {f"grad.{names[name]}": value.grad for name, value in heads.items() if value.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def folds(case: Case) -> dict[str, Tensor]:
    """Every fold of every benchmark that the case names, such as `coco_fwb_fold0.novel`."""
    found = {}
    for benchmark in BENCHMARKS:
        for number, fold in enumerate(benchmark_folds(benchmark)):
            found[f"{benchmark}_fold{number}.novel"] = torch.tensor(fold.novel)
            found[f"{benchmark}_fold{number}.train"] = torch.tensor(fold.base)
    return found


def metrics(case: Case) -> dict[str, Tensor]:
    classes = range(case.config["num_fold_classes"])
    counts = EpisodeCounts(classes, ignore_index=case.config["ignore_index"])
    rows = zip(*(case.inputs[name].numpy() for name in ("episode_class", "prediction", "target")), strict=True)
    for novel, prediction, target in rows:
        counts.update(int(novel), prediction, target)
    found = counts.metrics()
    values = {"FB_IoU": found.fb_iou, "bg_iou": found.background_iou, "fg_iou": found.foreground_iou,
              "class_iou": list(found.class_iou.values()), "mIoU": found.miou}  # fmt: skip
    return {name: torch.tensor(value) for name, value in values.items()}


FEW_SHOT: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("few_shot_segmentation", "pfenet"): pfenet,
    ("few_shot_segmentation", "bam_meta"): bam,
    ("few_shot_segmentation", "folds"): folds,
    ("few_shot_segmentation", "metrics"): metrics,
    ("svf", "few_shot_baseline"): svf_baseline,
}
