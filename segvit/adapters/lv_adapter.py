"""LV-Adapter: multi-scale adapters between frozen stages whose maps look up what the class names mean.

Paper     X. Liang et al., "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving", NeurIPS
          2022, arXiv 2209.08953.
Found     in its abstract and summaries; neither the full text nor code was at hand: an adapt stage between pretraining
          and finetuning, in which learnable multi-scale adapters train under all tasks' losses and the pretrained
          weights stay; language priors of CLIP by task-specific prompts; cross-attention from language to vision, and
          an alignment of visual and textual features, which strengthen what a pixel has to do with a class.
Proposed  all else, which is ours: a bottleneck (1 x 1, 3 x 3 depthwise, 1 x 1) on every stage's map, then attention of
          its cells to the class vectors, both added with zero effect at first; the widths; templates, and a learned
          offset of each class's vector as the prompt that fits the task; the pixel-text scores with temperature 0.07
          and their cross entropy as the alignment. Everything acts on the backbone's maps, so that any head follows.
Stages    Training with this adapter is the adapt stage. Context vectors inside the sentences (CoOp) are not offered:
          every saved adapter would carry the text tower.
Checked   tests/adapters/test_lv_adapter.py by behaviour and parameter counts; there is no official code.

Shapes    B images, K classes, E channels of CLIP's joint space, stage i with C channels on an h w grid, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.stages import gaps_behind_stages, stage_entropy
from segvit.contracts import Dense, UserError
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.tokens import Step, map_tokens, patch_map
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import text_tower

MAP = "lv_map"  # and the number of the stage: (B, K, h, w), pixel-text scores
TEMPERATURE = 0.07


class LanguagePrior(nn.Module):
    """The class vectors: frozen (K, E) of CLIP plus a learned offset, 0 at first, taken to (K, D)."""

    def __init__(self, embeddings: Tensor, *, width: int, learn_offsets: bool) -> None:
        super().__init__()
        self.embeddings: Tensor
        self.register_buffer("embeddings", embeddings)
        self.offsets = nn.Parameter(torch.zeros_like(embeddings)) if learn_offsets else None
        self.project = nn.Linear(embeddings.shape[1], width)

    def forward(self) -> Tensor:
        text = self.embeddings if self.offsets is None else self.embeddings + self.offsets
        return cast(Tensor, self.project(text))


class LanguageToVision(nn.Module):
    """A gap: x + bottleneck(x), then x + attention of its cells to the class vectors; hands on pixel-text scores."""

    def __init__(
        self, dim: int, prior: LanguagePrior, *, number: int, width: int, heads: int, reduction: int
    ) -> None:  # fmt: skip
        super().__init__()
        self.number, self.heads, inner = number, heads, max(1, dim // reduction)
        self.shared = (prior,)  # in a tuple: one gap alone registers it
        self.down, self.up = nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, dim, 1)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.norm, self.query = nn.LayerNorm(dim), nn.Linear(dim, width)
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, dim)
        self.align = nn.Linear(dim, width)
        for layer in (self.up, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, step: Step) -> Step:
        text, maps = self.shared[0](), patch_map(step)
        tokens = map_tokens(maps + self.up(F.gelu(self.mix(self.down(maps)))))  # (B, N, C)
        tokens = tokens + self.out(self.context(tokens, text))
        pixels, words = F.normalize(self.align(tokens), dim=-1), F.normalize(text, dim=-1)
        scores = (pixels @ words.T / TEMPERATURE).mT.unflatten(2, step.grid)  # (B, K, h, w)
        whole = torch.cat([step.tokens[:, : step.prefix], tokens], dim=1)
        return step._replace(tokens=whole, extras={**step.extras, f"{MAP}{self.number}": scores})

    def context(self, tokens: Tensor, text: Tensor) -> Tensor:
        """What the cells find among the classes: (B, N, C) and (K, D) -> (B, N, D)."""
        query = split_heads(self.query(self.norm(tokens)), self.heads)
        key, value = self.key_value(text).expand(tokens.shape[0], -1, -1).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(query, split_heads(key, self.heads), split_heads(value, self.heads))
        return join_heads(mixed)


def lv_adapter(
    backbone: nn.Module, *, class_names: Sequence[str | Sequence[str]], text_weights: str | None = None,
    text_model: str | None = None, templates: str | Sequence[str] = "photo", width: int = 256, heads: int = 8,
    reduction: int = 4, learn_offsets: bool = True, num_classes: int | None = None, text_dim: int | None = None,
) -> Handle:  # fmt: skip
    """An adapter behind every stage; the first output is the frozen network's.

    `class_names` are the model's own unless given; a list of synonyms may stand for a name. Their vectors come from the
    CLIP text tower of `text_model`, a name of open_clip such as ViT-B-16, with `text_weights`, a tag such as `openai`
    or a file, which alone is enough for OpenAI's architectures; see `segvit.text.templates` for `templates`. `width` is
    D, `reduction` that of the bottlenecks. `learn_offsets=False` keeps the vectors as they are. Saved folders hold the
    vectors, so that they need no text tower: there `text_dim`, the vectors' length E, stands in for it.

    Raises UserError for a backbone without stages, and when the text tower's weights are not to be had.
    """
    if min(width, heads, reduction) < 1 or width % heads:
        raise UserError(f"width, heads and reduction must be positive and heads divide width, got {width}, {heads} and "
                        f"{reduction}")  # fmt: skip
    if num_classes not in (None, len(class_names)):
        raise UserError(f"class_names has {len(class_names)} entries, but the model has {num_classes} classes; "
                        "give one for each")  # fmt: skip
    gaps, like = gaps_behind_stages(backbone), next(backbone.parameters())
    embeddings = text_vectors(
        "lv_adapter", class_names, text_model, text_weights, templates=templates, dim=text_dim
    )  # fmt: skip
    # The vectors are saved with the adapter: whoever loads it needs their length only.
    recorded: dict[str, Any] = {"text_model": None, "text_weights": None, "text_dim": embeddings.shape[1]}
    handle = Handle(backbone, recorded=recorded)
    prior = LanguagePrior(embeddings, width=width, learn_offsets=learn_offsets)
    for number, (path, dim) in enumerate(gaps, start=1):
        gap = LanguageToVision(dim, prior, number=number, width=width, heads=heads, reduction=reduction)
        if number == 1:
            gap.prior = prior
        handle.add(path, gap.to(like.device, like.dtype))
    return handle


def text_vectors(
    method: str, names: Sequence[str | Sequence[str]], model: str | None, weights: str | None, *,
    templates: str | Sequence[str], dim: int | None,
) -> Tensor:  # fmt: skip
    """The class vectors (K, E) of a method that needs them; zeros to be loaded where only their length is given.

    Raises UserError when they can come from nowhere.
    """
    if dim is not None:
        if weights is not None or model is not None:
            raise UserError("text_dim stands in for the text tower, so it excludes text_weights and text_model")
        return torch.zeros(len(names), dim)
    if weights is None:
        raise UserError(
            f"{method} needs the text tower of a trained CLIP for the class names: give text_weights, a checkpoint's "
            "path or, with text_model such as ViT-B-16, a tag such as openai"
        )
    plain = [name.replace("_", " ") if isinstance(name, str) else name for name in names]
    return class_embeddings(text_tower(model, weights=weights), plain, templates=templates).detach()


def normalisers(masks: Tensor, *, ignore_index: int) -> dict[str, Tensor]:
    """The valid pixels, which the engine sums over the global batch."""
    return {"lv_valid": (masks != ignore_index).sum()}


def losses(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int, weight: float = 0.4
) -> dict[str, Tensor]:
    """The alignment of pixels and words: the mean over stages of the scores' cross entropy, weighted."""
    return {"loss_lv": weight * stage_entropy(out, masks, totals["lv_valid"], prefix=MAP, ignore_index=ignore_index)}
