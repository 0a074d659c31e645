"""CAVPT on a dense system: prompts for every block of a frozen plain ViT, made of the classes' words in the upper ones.

Paper     Y. Xing et al., "Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model", IEEE Trans. Multimedia
          2023, arXiv 2208.08340: image classification, see `segvit.systems.dpt_clip` and the parts in `cavpt`.
Found     Lower blocks have learned prompts of their own. In the upper ones selected classes look for themselves among
          the image's tokens by cross-attention, and what they find are the prompts. A first pass without prompts
          selects an image's likeliest classes. Words are learned too; each prompt is asked which class it is about.
Proposed  all that is dense, for the paper has no masks: words are frozen class vectors plus learned offsets, since
          context vectors would put the text tower into every saved adapter; the first phase (`general_steps`) adds the
          entropy of two maps to the system's own loss instead of weighing that by 0.1: patches without prompts against
          learned words, patches with prompts against frozen ones; a prompt is asked where its class is in the masks.
Elsewhere A ViT without CLIP's joint space cannot select: all classes are queries there, and there is no first phase.
Checked   its parts by tests/golden/dpt_cavpt__*; the whole by behaviour, tests/adapters/test_class_prompts.py.

Shapes    B images, K classes, P prompts of a block, E joint channels, D channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.adapters.cavpt import STD, PromptGenerator
from segvit.adapters.handle import Handle
from segvit.adapters.lv_adapter import text_vectors
from segvit.adapters.stages import stage_entropy
from segvit.backbones.clip import JointEmbedding
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, UserError
from segvit.nn.tokens import Step

CLASSES, LOGITS, GUIDE, EARLY = "cavpt_classes", "cavpt_logits", "cavpt_guide", "cavpt_early"  # in the extras
SCALE = 100.0  # of cosines, as trained CLIPs have


class PromptParts(nn.Module):
    """What all gaps share: words, learned prompts of lower blocks, generators of upper ones, and steps trained."""

    embeddings: Tensor
    steps: Tensor

    def __init__(
        self, embeddings: Tensor, dim: int, *, plain: int, depth: int, length: int, select: int | None, key_dim: int,
        extra_keys: int, general_steps: int,
    ) -> None:  # fmt: skip
        super().__init__()
        classes, width = embeddings.shape
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.offsets = nn.Parameter(torch.zeros_like(embeddings))
        self.deep = nn.Parameter(STD * torch.randn(plain, length, dim)) if plain * length else None
        self.generator = PromptGenerator(
            depth - plain, dim, width, num_classes=classes, key_dim=key_dim, extra_keys=extra_keys
        )  # fmt: skip
        self.plain, self.depth, self.general_steps = plain, depth, general_steps
        self.select = None if select is None else min(select, classes)

    def count(self, layer: int) -> int:
        """P of a block; none before the first."""
        if layer < 0:
            return 0
        if layer < self.plain:
            return 0 if self.deep is None else self.deep.shape[1]
        return len(self.embeddings) if self.select is None else self.select

    def text(self) -> Tensor:
        """The learned words (K, E)."""
        return self.embeddings + self.offsets

    def scores(self, vit: PlainViT, step: Step, text: Tensor) -> Tensor:
        """Scaled cosines of the patches and the words (K, E): (B, K, h, w)."""
        patches = cast(nn.Module, vit.embedding)(step.tokens[:, step.prefix :])
        cosines = F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).mT
        return SCALE * cosines.mT.unflatten(2, step.grid)


class PromptGap(nn.Module):
    """The gap before a block: its prompts in the place of those before, behind the prefix; the last one only removes.

    The first one also selects the classes, by a pass without prompts.
    """

    def __init__(self, vit: PlainViT, parts: PromptParts, layer: int) -> None:
        super().__init__()
        self.shared, self.layer = (vit, parts), layer  # in a tuple: the network itself and the first gap have them
        if layer == 0:
            self.parts = parts

    def forward(self, step: Step) -> Step:
        vit, parts = self.shared
        kept = step.prefix - parts.count(self.layer - 1)
        head, patches = step.tokens[:, :kept], step.tokens[:, step.prefix :]
        bare = step._replace(tokens=torch.cat([head, patches], dim=1), prefix=kept)
        if self.layer == 0:
            bare = bare._replace(extras={**bare.extras, **self.first(bare)})
        if self.layer == parts.depth:
            guided = self.training and parts.select is not None
            guide = {f"{GUIDE}1": parts.scores(vit, bare, parts.embeddings)} if guided else {}
            return bare._replace(extras={**bare.extras, **guide})
        prompts, extras = self.prompts(bare)
        tokens = torch.cat([head, prompts, patches], dim=1)
        return bare._replace(tokens=tokens, prefix=kept + prompts.shape[1], extras=extras)

    def prompts(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The block's prompts (B, P, D), and the extras with what the generator says of them."""
        _, parts = self.shared
        if self.layer < parts.plain:
            none = step.tokens[:, :0]
            own = none if parts.deep is None else parts.deep[self.layer].expand(step.tokens.shape[0], -1, -1)
            return own, step.extras
        generated = parts.generator(self.layer - parts.plain, step.tokens, parts.text()[step.extras[CLASSES]])
        return generated.prompts, {**step.extras, f"{LOGITS}{self.layer}": generated.logits}

    def first(self, step: Step) -> dict[str, Tensor]:
        """The selected classes (B, P) and, in training with a joint space, the phase and the map without prompts."""
        vit, parts = self.shared
        batch = step.tokens.shape[0]
        if parts.select is None:
            return {CLASSES: torch.arange(len(parts.embeddings), device=step.tokens.device).expand(batch, -1)}
        with torch.no_grad():
            for index in range(len(vit.blocks)):
                step = vit.run(index, step, bare=True)
            pooled = F.normalize(cast(nn.Module, vit.embedding)(step.tokens[:, 0]), dim=-1)
            classes = (pooled @ parts.embeddings.mT).topk(parts.select).indices
        if not self.training:
            return {CLASSES: classes}
        early = (parts.steps < parts.general_steps).to(pooled.dtype).expand(batch)
        parts.steps = parts.steps + 1
        return {CLASSES: classes, EARLY: early, f"{GUIDE}0": parts.scores(vit, step, parts.text())}


def cavpt(
    backbone: nn.Module, *, class_names: Sequence[str | Sequence[str]], text_weights: str | None = None,
    text_model: str | None = None, templates: str | Sequence[str] = "photo", num_prompts: int = 10,
    class_prompts: int = 10, bottom_limit: int | None = None, key_dim: int = 32, extra_keys: int = 10,
    general_steps: int = 1000, num_classes: int | None = None, text_dim: int | None = None,
) -> Handle:  # fmt: skip
    """Prompts of an image's classes: `num_prompts` learned ones in lower blocks, made of words and image in upper ones.

    `bottom_limit` is the first block with class-aware prompts, counted from 1; None = the last one that runs. On CLIP's
    ViTs the `class_prompts` likeliest classes of an image are asked for, elsewhere all. `general_steps` is the length
    of the first phase. `class_names`, `text_weights`, `text_model`, `templates` and `text_dim` are as for lv_adapter.

    Raises UserError unless it is a plain ViT, and when CLIP's joint space is not the words'.
    """
    if not isinstance(backbone, PlainViT):
        raise UserError(f"cavpt needs a plain ViT, not {type(backbone).__name__}; use ssf or lora instead")
    depth = backbone.out_indices[-1] + 1  # later blocks do not run
    limit = depth if bottom_limit is None else bottom_limit
    if not 1 <= limit <= depth or min(num_prompts, extra_keys) < 0 or min(class_prompts, key_dim) < 1:
        raise UserError(f"bottom_limit is {limit}, num_prompts {num_prompts}, class_prompts {class_prompts}, key_dim "
                        f"{key_dim}; choose a block in 1..{depth} and positive numbers")  # fmt: skip
    if num_classes not in (None, len(class_names)):
        raise UserError(f"class_names has {len(class_names)} entries, but the model has {num_classes} classes")
    embeddings = text_vectors("cavpt", class_names, text_model, text_weights, templates=templates, dim=text_dim)
    joint = isinstance(backbone.embedding, JointEmbedding) and depth == len(backbone.blocks)
    if joint and cast(Any, backbone.embedding).proj.out_features != embeddings.shape[1]:
        raise UserError(f"the words have {embeddings.shape[1]} channels, which is not the joint space of this tower; "
                        "give text_weights of the same CLIP")  # fmt: skip
    recorded: dict[str, Any] = {"text_model": None, "text_weights": None, "text_dim": embeddings.shape[1]}
    handle, like = Handle(backbone, recorded=recorded), next(backbone.parameters())
    parts = PromptParts(
        embeddings, backbone.dim, plain=limit - 1, depth=depth, length=num_prompts, key_dim=key_dim,
        select=class_prompts if joint else None, extra_keys=extra_keys, general_steps=general_steps,
    ).to(like.device, like.dtype)  # fmt: skip
    for layer in range(depth + 1):
        handle.add(f"gaps.{layer}", PromptGap(backbone, parts, layer))
    return handle


def normalisers(masks: Tensor, *, ignore_index: int) -> dict[str, Tensor]:
    """The valid pixels and the images, which the engine sums over the global batch."""
    images = torch.tensor(len(masks), device=masks.device)
    return {"cavpt_valid": (masks != ignore_index).sum(), "cavpt_images": images}


def losses(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int, class_weight: float = 0.3
) -> dict[str, Tensor]:
    """The entropies of the first phase's maps, and of the prompts whose class is in the image, by `class_weight`."""
    logits = torch.stack([value.float() for name, value in out.extras.items() if name.startswith(LOGITS)], dim=1)
    classes = out.extras[CLASSES]
    present = torch.stack([torch.bincount(m.flatten().long(), minlength=ignore_index + 1) > 0 for m in masks])
    hit = present.gather(1, classes)[:, None].expand(logits.shape[:3])  # (B, blocks, P)
    truth = classes[:, None].expand(hit.shape)
    entropy = F.cross_entropy(logits.movedim(3, 1), truth, reduction="none") * hit
    means = entropy.sum((1, 2)) / hit.sum((1, 2)).clamp(min=1)
    terms = {"loss_class": class_weight * means.sum() / totals["cavpt_images"]}
    if EARLY not in out.extras:
        return terms
    guide = 2 * stage_entropy(out, masks, totals["cavpt_valid"], prefix=GUIDE, ignore_index=ignore_index)
    return {"loss_general": out.extras[EARLY].mean() * guide} | terms
