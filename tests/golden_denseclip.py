"""Builders of our counterparts to the golden cases of DenseCLIP, except for its towers, which are in golden_clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segvit.backbones.clip import ClipResNet, clip_vit
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, InputSpec
from segvit.inference.windows import WindowedScores
from segvit.systems import denseclip
from segvit.systems.denseclip import ContextDecoder, DenseCLIP, Levels, PostModel, PreModel, Words
from segvit.text.architecture import VisionConfig
from segvit.text.tokenize import tokenize
from tests.golden.run import Case
from tests.golden_clip import text_of, whole_patches
from tests.golden_mmseg import in_bands, numbered

HEADS = 32  # of the attention pool, whatever its width


def dense_tokens(weights: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """A state dict with its whole token table, which is stored by the rows that are used."""
    state = {key: value for key, value in weights.items() if "::" not in key}
    key = "text_encoder.token_embedding.weight"
    if key not in state:
        rows = weights[f"{key}::rows"]
        state[key] = torch.zeros(vocab_size, rows.shape[1]).index_copy(0, weights[f"{key}::ids"].long(), rows)
    return state


def words_of(config: dict[str, Any], weights: dict[str, Tensor], names: list[str], length: int) -> Words:
    state = {key.removeprefix("text_encoder."): v for key, v in weights.items() if key.startswith("text_encoder.")}
    return Words(text_of(config, state), tokenize(names, context_length=length))


def decoder_of(config: dict[str, Any]) -> ContextDecoder:
    return ContextDecoder(
        config["visual_dim"], config["transformer_width"], heads=config["transformer_heads"],
        layers=config["transformer_layers"], dropout=config["dropout"],
    )  # fmt: skip


def context_decoder(case: Case) -> dict[str, Tensor]:
    decoder = decoder_of(case.config)
    state = denseclip.convert({f"context_decoder.{key}": value for key, value in case.weights.items()})
    decoder.load_state_dict({key.removeprefix("prompting.decoder."): value for key, value in state.items()})
    text, visual = (case.inputs[name].clone().requires_grad_() for name in ("text", "visual"))
    change = decoder.eval()(text, visual)
    (change * torch.linspace(-1, 1, change.numel()).view_as(change)).sum().backward()
    assert text.grad is not None
    assert visual.grad is not None
    return {"text_diff": change.detach(), "grad.text": text.grad, "grad.visual": visual.grad}


@torch.no_grad()
def pre_model_assembly(case: Case) -> dict[str, Tensor]:
    config = case.config
    words = words_of(config, case.weights, config["class_names"], config["text_tokens"])
    assert torch.equal(words.get_buffer("tokens"), case.inputs["tokens"])
    model = PreModel(words, decoder_of(config["context_decoder"]), num_contexts=config["n_context"])
    state = denseclip.convert(dense_tokens(case.weights, config["vocab_size"]))
    model.load_state_dict({key.removeprefix("prompting."): value for key, value in state.items()})
    visual = case.inputs["visual"]
    return {"contexts": model.eval().contexts(visual), "text_embeddings": model(visual)}


def backbone_of(config: dict[str, Any]) -> tuple[ClipResNet | PlainViT, Levels | None, list[int]]:
    """The image tower in DenseCLIP's words, what makes levels of a ViT, and their widths."""
    side, width = config["input_resolution"], config["width"]
    common: dict[str, Any] = {"width": width, "embed_dim": config["output_dim"], "image_size": side}
    if isinstance(config["layers"], list):
        resnet = ClipResNet(
            VisionConfig(layers=tuple(config["layers"]), heads=config.get("attnpool_heads", HEADS), **common),
            image_size=(side, side),
            padded=False,
        )
        return resnet, None, list(resnet.dims)
    layers, wanted = config["layers"], config.get("out_indices", [3, 5, 7, 11])
    blocks = sorted({*wanted, layers - 1})
    vision = VisionConfig(
        layers=layers, heads=config.get("heads", width // 64), patch_size=config.get("patch_size", 16), **common
    )
    vit = clip_vit(
        vision, image_size=(side, side), out_indices=blocks, position_mode="bilinear", doubled_class=True,
        drop_path=config.get("drop_path_rate", 0.0),
    )  # fmt: skip
    places = [blocks.index(index) for index in wanted]
    return vit, Levels(width, places, fine=vision.patch_size == 8), [width] * 4


def model_of(config: dict[str, Any], weights: dict[str, Tensor]) -> DenseCLIP:
    backbone, levels, dims = backbone_of(config["backbone"])
    text = config["text_encoder"]
    words = words_of(text, weights, config["class_names"], config["context_length"])
    contexts = weights["contexts"].shape[1]
    model = denseclip.assemble(
        backbone, PostModel(words, decoder_of(config["context_decoder"]), num_contexts=contexts), dims=dims,
        strides=config.get("feature_strides", denseclip.STRIDES), scored=config["score_concat_index"],
        num_classes=config["num_classes"], fpn_dim=config["fpn_channels"], head_dim=config["head_channels"],
        dropout=0.1, levels=levels,
    )  # fmt: skip
    model.load_state_dict(denseclip.convert(dense_tokens(weights, text["vocab_size"])))
    return model.eval()


def run(model: DenseCLIP, image: Tensor) -> Dense:
    """A ViT sees whole patches only, as the original does; what comes of them covers the image."""
    seen = whole_patches(model.backbone, image) if isinstance(model.backbone, PlainViT) else image
    return model(seen)._replace(covers=(image.shape[-2], image.shape[-1]))


class SlidingRuntime:
    """The model with the case's windows."""

    def __init__(self, model: DenseCLIP, config: dict[str, Any]) -> None:
        self.model, self.readout, self.classes = model, denseclip.READOUT, numbered(config["num_classes"])
        self.spec = InputSpec(window=tuple(config["crop"]), stride=tuple(config["stride"]))

    def __call__(self, images: Tensor) -> Dense:
        return run(self.model, images)


def model_scores(out: Dense, size: tuple[int, int]) -> Tensor:
    return denseclip.READOUT(out, size, range(size[0]))


def gradients(model: DenseCLIP, case: Case) -> dict[str, Tensor]:
    """Gradients by the official names, found by sending numbered tensors through `convert`."""
    keys = list(case.weights)
    names = denseclip.convert({key: torch.full((1, 1), number) for number, key in enumerate(keys)})
    ours = {keys[int(number)]: name for name, number in names.items()}
    found = {}
    for output, expected in case.outputs.items():
        if output.startswith("grad."):
            gradient = model.get_parameter(ours[output.removeprefix("grad.")]).grad
            assert gradient is not None
            found[output] = (gradient.mT if output.endswith("backbone.proj") else gradient).reshape(expected.shape)
    return found


def accuracy(scores: Tensor, labels: Tensor, ignore: int) -> Tensor:
    return 100 * (scores.argmax(1) == labels)[labels != ignore].float().mean().reshape(1)


def post_model(case: Case) -> dict[str, Tensor]:
    config, image = case.config, case.inputs["image"]
    model, size = model_of(config, case.weights), (image.shape[-2], image.shape[-1])
    seen: dict[str, Any] = {}
    model.fpn.register_forward_hook(lambda module, args, out: seen.update(maps=args[0], levels=out))
    out = run(model, image)
    assert isinstance(model.prompting, PostModel)
    outputs = {
        "tokens": model.prompting.words.get_buffer("tokens"), "score_map": out.extras["score_map"],
        "text_embeddings": out.extras["texts"], "text_embeddings_raw": model.prompting.plain(),
        "concat_feature": seen["maps"][model.scored], "logits": model_scores(out, size),
        **{f"fpn_{i}": level for i, level in enumerate(seen["levels"])},
    }  # fmt: skip
    if "labels" in case.inputs:
        labels, ignore = case.inputs["labels"].squeeze(1), config.get("ignore_index", 255)
        totals = denseclip.normalisers(labels, num_classes=config["num_classes"], ignore_index=ignore)
        losses = denseclip.criterion(
            out, labels, totals, ignore_index=ignore, score_map=config["aux_loss_weight"], temperature=config["tau"],
            cross_entropy=config["decode_loss_weight"],
        )  # fmt: skip
        torch.stack(list(losses.values())).sum().backward()
        outputs |= gradients(model, case)
        aux = model_scores(out._replace(logits=out.extras["score_map"]), size)
        outputs |= {
            "decode.loss_ce": losses["loss_ce"], "aux_identity.loss_ce": losses["loss_score_map"],
            "decode.acc_seg": accuracy(outputs["logits"], labels, ignore),
            "aux_identity.acc_seg": accuracy(aux, labels, ignore),
        }  # fmt: skip
    if "large_image" in case.inputs:
        large = case.inputs["large_image"]
        with torch.no_grad():
            view = WindowedScores(SlidingRuntime(model, config), large[0])
            outputs["slide_logits"] = in_bands(view, (large.shape[-2], large.shape[-1]))[None]
    return {name: value.detach() for name, value in outputs.items()}


DENSECLIP: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("denseclip", "context_decoder"): context_decoder,
    ("denseclip", "pre_model_assembly"): pre_model_assembly,
    ("denseclip", "post_model_resnet"): post_model,
    ("denseclip", "post_model_vit"): post_model,
}
