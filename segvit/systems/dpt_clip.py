"""CLIP with dual-modality prompts (DPT with CAVPT): few-shot image classification by words, and scores of its patches.

Paper     Y. Xing et al., "Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model", IEEE Trans. Multimedia
          2023, arXiv 2208.08340. Nothing to do with DPT, the dense prediction transformer.
Found     A frozen CLIP without prompts picks the likeliest classes of an image; their learned texts make the
          class-aware prompts. Three sets of logits train, one predicts. Official models come in through `convert`.
Proposed  `dense_logits`, which compares each patch with the learned texts. The paper has no dense prediction.
Use       `segvit classify train --model dpt_clip_vit_base`. The phase of the loss follows from the steps trained so
          far. Without visual prompts (`bottom_limit` the depth + 1, `length` 0, `general_steps` 0) this is CoOp, which
          is zsseg's prompt learning when the images are crops of regions (`segvit clip crops`, `segvit clip words`).
Not here  Three SGD optimisers with rates of their own: `parameter_groups` has them for a loop of one's own. Accuracies
          of the paper were not reproduced.
Checked   tests/golden/dpt_cavpt__full_model (fanrena/DPT), outputs, losses and gradients.

Shapes    B images, K classes, E joint channels, P selected classes, G blocks with class-aware prompts, h w grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.adapters.cavpt import Position, TextPrompts, VisualPrompts
from segvit.backbones.clip import Towers, build_backbone, rename_vit
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, Features, Readout, UserError
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import Step
from segvit.text.checkpoint import named_clip
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import build_text

EXTRAS = ("text_logits", "image_logits", "selected", "class_logits")  # of `Outputs`, in their order


class Encoded(NamedTuple):
    """What images and classes become; vectors are not normalised."""

    features: Features  # with the prompts; `pooled` (B, E) and `extras["dense"]` (B, E, h, w)
    plain: Tensor  # (B, E) without prompts
    texts: Tensor  # (K, E) learned
    selected: Tensor  # (B, P) classes, the likeliest first
    class_logits: Tensor  # (B, G, P, K), auxiliary


class Outputs(NamedTuple):
    """Logits over the classes, (B, K), and what the auxiliary loss needs."""

    logits: Tensor  # both prompts; the prediction
    text_logits: Tensor  # image without prompts, learned texts
    image_logits: Tensor  # image with prompts, texts from templates
    selected: Tensor  # (B, P)
    class_logits: Tensor  # (B, G, P, K)


class DualPromptClip(nn.Module):
    """Frozen towers of `clip_towers` with three kinds of prompts, which alone train.

    `context`, `position` and `class_specific` are those of `TextPrompts`; `bottom_limit` (the depth by default),
    `length`, `key_dim` and `extra_keys` those of `VisualPrompts`. `class_prompts` classes at most are selected for an
    image. `template` is the sentence of the frozen branch, or a name of `segvit.text.templates`; the paper has pets,
    flowers, aircraft, texture, satellite, food, action, and photo for all others. The first `general_steps` of training
    are the loss's first phase. Raises UserError for a ResNet, and for an empty or repeated name.
    """

    def __init__(
        self, towers: Towers, names: Sequence[str], *, template: str = "a photo of a {}.",
        context: int | str = 16, position: Position = "end", class_specific: bool = False, length: int = 10,
        class_prompts: int = 10, bottom_limit: int | None = None, key_dim: int = 32, extra_keys: int = 10,
        general_steps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(towers.image, PlainViT):
            raise UserError(
                "visual prompts need a ViT's tokens, and this is CLIP's ResNet; choose one such as ViT-B-32"
            )
        if class_prompts < 1:
            raise UserError(f"class_prompts is {class_prompts}; select 1 class or more")
        self.image, self.text = towers.image.requires_grad_(False), towers.text.requires_grad_(False)
        self.mean, self.std = towers.image.mean, towers.image.std
        self.class_prompts, self.general_steps = min(class_prompts, len(names)), general_steps
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.general: Tensor
        plain = [name.replace("_", " ") for name in names]
        known = not self.text.text_projection.is_meta  # else there is only a shape to know
        general = (
            class_embeddings(self.text, plain, templates=template, cache=False) if known
            else torch.empty(len(names), self.text.embed_dim)
        )  # fmt: skip
        self.register_buffer("general", general)
        self.logit_scale: Tensor
        self.register_buffer("logit_scale", torch.tensor(towers.logit_scale))
        depth = len(self.image.blocks)
        self.text_prompts = TextPrompts(
            self.text, names, context=context, position=position, class_specific=class_specific
        )
        self.visual_prompts = VisualPrompts(
            depth, self.image.dim, self.text.embed_dim, num_classes=len(names), length=length, key_dim=key_dim,
            bottom_limit=depth if bottom_limit is None else bottom_limit, extra_keys=extra_keys,
        )  # fmt: skip

    def encode(self, images: Tensor) -> Encoded:
        """Images (B, 3, H, W), normalised as CLIP's."""
        texts = self.text_prompts(self.text)
        with torch.no_grad():
            step = self.image.embed(images)
            plain = self.without_prompts(step)
            selected = self.similarity(plain, self.general).topk(self.class_prompts).indices
        features, logits = self.visual_prompts(self.image, step, texts[selected])
        shape = (len(images), 0, self.class_prompts, len(texts))
        class_logits = torch.stack(logits, dim=1) if logits else texts.new_zeros(shape)
        return Encoded(features, plain, texts, selected, class_logits)

    def without_prompts(self, step: Step) -> Tensor:
        """CLIP's own vectors (B, E) of embedded images."""
        for index in range(len(self.image.blocks)):
            step = self.image.run(index, step)
        pooled = self.image.features([], step).pooled
        assert pooled is not None  # CLIP's ViT has a class token
        return pooled

    def similarity(self, vectors: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines of (..., E) and (K, E): (..., K)."""
        return self.logit_scale.exp() * F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).T

    def forward(self, images: Tensor) -> Dense:
        """Logits as a map of one cell (B, K, 1, 1), as classifiers give them; the others are in `extras`."""
        out = self.outputs(images)
        extras = dict(zip(EXTRAS, out[1:], strict=True))
        early = (self.steps < self.general_steps).expand(images.shape[0])
        if self.training:
            self.steps = self.steps + 1
        return Dense(out.logits[..., None, None], extras | {"early": early}, (images.shape[-2], images.shape[-1]))

    def outputs(self, images: Tensor) -> Outputs:
        """The three sets of logits and the auxiliary ones."""
        coded = self.encode(images)
        pooled = coded.features.pooled
        assert pooled is not None
        return Outputs(
            self.similarity(pooled, coded.texts), self.similarity(coded.plain, coded.texts),
            self.similarity(pooled, self.general), coded.selected, coded.class_logits,
        )  # fmt: skip

    def dense_logits(self, images: Tensor) -> Tensor:
        """Scaled cosines of each patch with the learned texts, (B, K, h, w); our extension, not the paper's."""
        coded = self.encode(images)
        return self.similarity(coded.features.extras["dense"].movedim(1, -1), coded.texts).movedim(-1, 1)


READOUT = Readout(logit_rows)


def normalisers(labels: Tensor) -> dict[str, Tensor]:
    """The number of images."""
    return {"images": torch.tensor(float(len(labels)), device=labels.device)}


def criterion(
    out: Dense, labels: Tensor, totals: dict[str, Tensor], *, label_smoothing: float = 0.0, prompt_weight: float = 0.1,
    class_weight: float = 0.3,
) -> dict[str, Tensor]:  # fmt: skip
    """`losses` of labels (B,) in the phase that the output belongs to, over the images of the whole batch."""
    parts = Outputs(out.logits.flatten(1), *(out.extras[name] for name in EXTRAS))
    terms = losses(
        parts, labels.long(), epoch=1 - int(out.extras["early"][0]), general_epochs=1, prompt_weight=prompt_weight,
        class_weight=class_weight, label_smoothing=label_smoothing,
    )  # fmt: skip
    share = len(labels) / totals["images"]
    return {name if name != "loss" else "loss_both": share * value for name, value in terms.items()}


def losses(
    out: Outputs, labels: Tensor, *, epoch: int, general_epochs: int = 30, prompt_weight: float = 0.1,
    class_weight: float = 0.3, label_smoothing: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Weighted terms for labels (B,); their sum is the loss.

    Before epoch `general_epochs`, counted from 0, each modality's prompts learn against the other's frozen branch, and
    the prediction weighs `prompt_weight`; then the prediction alone. The auxiliary term is over the prompts of the
    true class, and is left out when it was selected for no image. `class_weight` is alpha, 0.3 in the official script
    and 1.0 in the official configuration.
    """
    entropy = partial(F.cross_entropy, label_smoothing=label_smoothing)
    terms = {"loss": entropy(out.logits, labels)}
    if epoch < general_epochs:
        terms = {
            "loss_text": entropy(out.text_logits, labels), "loss_image": entropy(out.image_logits, labels),
            "loss": prompt_weight * terms["loss"],
        }  # fmt: skip
    images, slots = (out.selected == labels[:, None]).nonzero(as_tuple=True)
    about = out.class_logits[images, :, slots]  # (hits, G, K)
    if about.numel():
        truth = labels[images, None].expand(about.shape[:2])
        terms["loss_class"] = class_weight * F.cross_entropy(about.flatten(0, 1), truth.flatten())
    return terms


def parameter_groups(model: DualPromptClip) -> list[dict[str, Any]]:
    """What trains, with the paper's learning rates: visual prompts and generator 0.01, words 0.002."""
    return [
        {"params": list(model.visual_prompts.parameters()), "lr": 0.01},
        {"params": list(model.text_prompts.parameters()), "lr": 0.002},
    ]


def dpt_clip(
    *, num_classes: int, class_names: Sequence[str] | None = None, clip: str = "ViT-B-16-quickgelu",
    weights: str | None = None, image_size: int | None = None, template: str = "photo", context: int | str = 16,
    position: Position = "end", class_specific: bool = False, length: int = 10, class_prompts: int = 10,
    bottom_limit: int | None = None, key_dim: int = 32, extra_keys: int = 10, general_steps: int = 1000,
    embed_dim: int | None = None, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None,
) -> DualPromptClip:  # fmt: skip
    """The classifier on both towers of `clip`, a name of open_clip, with `weights`: a tag such as `openai`, or a file.

    `embed_dim`, `vision` and `text` change the towers' sizes for training from nothing; see `DualPromptClip` for the
    rest. `general_steps` is half a run in the paper. Raises UserError for another number of names than classes.
    """
    names = [f"class {number}" for number in range(num_classes)] if class_names is None else class_names
    if len(names) != num_classes:
        raise UserError(f"class_names has {len(names)} entries, but the model has {num_classes} classes")
    found = named_clip(clip, weights, embed_dim=embed_dim, vision=vision, text=text)
    scale = math.log(1 / 0.07) if found.state is None else found.state["logit_scale"].item()
    return DualPromptClip(
        Towers(build_backbone(found, image_size=image_size), build_text(found), scale), names, template=template,
        context=context, position=position, class_specific=class_specific, length=length, class_prompts=class_prompts,
        bottom_limit=bottom_limit, key_dim=key_dim, extra_keys=extra_keys, general_steps=general_steps,
    )  # fmt: skip


dpt_clip_vit_base = partial(dpt_clip, clip="ViT-B-16-quickgelu")
dpt_clip_vit_base_patch32 = partial(dpt_clip, clip="ViT-B-32-quickgelu")

SHARED = r"^zeroshot_clip_image_encoder\."  # the image tower once more
RULES: Rules = (
    (r"^text_encoder\.", "text."),
    (r"^text_features$", "general"),
    (r"^prompt_learner\.ctx$", "text_prompts.context"),
    (r"^prompt_learner\.token_prefix$", "text_prompts.start"),
    (r"^prompt_learner\.token_suffix$", "text_prompts.rest"),
    (r"^image_encoder\.transformer\.ctx_learner\.ctx$", "visual_prompts.deep"),
    (r"^image_encoder\.transformer\.extractor\.", "visual_prompts.generator."),
    (r"^(visual_prompts\.generator\.)ctx$", r"\1extra"),
    (r"^(visual_prompts\.generator\.)meta_nets\.(\d+)\.", r"\1layers.\2.text."),
    (r"^(visual_prompts\.generator\.)attns\.(\d+)\.qmlp\.", r"\1layers.\2.query."),
    (r"^(visual_prompts\.generator\.)attns\.(\d+)\.kmlp\.", r"\1layers.\2.key."),
    (r"^(visual_prompts\.generator\.)attns\.(\d+)\.vmlp\.", r"\1layers.\2.value."),
    (r"^(visual_prompts\.generator\.)lns\.(\d+)\.", r"\1layers.\2.class_norm."),
    (r"^(visual_prompts\.generator\.)lns2\.(\d+)\.", r"\1layers.\2.norm."),
    (r"^(visual_prompts\.generator\.)classfiers\.(\d+)\.", r"\1layers.\2.classify."),  # official spelling
    (r"^image_encoder\.proj\.proj$", "image_encoder.proj"),
)
OF_CLASSES = r"^(text_features$|prompt_learner\.token_)|\.classfiers\.\d+\."


def convert(state: dict[str, Tensor], *, new_classes: bool = False) -> dict[str, Tensor]:
    """A state dict of the official trainer in our names; it has no token table, which the text tower keeps.

    With `new_classes` what belongs to the trained classes is left out, for a model that is built with other names;
    context vectors of `class_specific` ones stay, and do not fit. The official trainer saves its parts in folders named
    as the keys' first words here, such as `prompt_learner`, to be put before each key.
    """
    unused = f"{SHARED}|{OF_CLASSES}" if new_classes else SHARED
    filled = {key: value for key, value in state.items() if value.numel()}  # nothing is stored for no prompts
    renamed = rename(filled, RULES, unused=unused)
    tower = "image_encoder."
    image = {key.removeprefix(tower): value for key, value in renamed.items() if key.startswith(tower)}
    others = {key: value for key, value in renamed.items() if not key.startswith(tower)}
    return others | {f"image.{key}": value for key, value in rename_vit(image).items()}
