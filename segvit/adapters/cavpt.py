"""Dual-modality prompts for CLIP's towers: learned words, deep visual prompts, and class-aware visual prompts (CAVPT).

Paper     Y. Xing et al., "Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model", IEEE Trans. Multimedia
          2023, arXiv 2208.08340; the words are CoOp's (K. Zhou et al., IJCV 2022).
Use       These are the parts; `segvit.systems.dpt_clip` puts them together as in the paper. What adapts a dense system
          with them is `segvit.adapters.class_prompts`.
Differs   Prompts stand behind the class token instead of at the end. CLIP's blocks do not see the order, so nothing
          changes, and the patch tokens stay the last ones of a Step. Extra keys start from normal noise (proposed).
Checked   tests/golden/dpt_cavpt__{generator,text_prompt_end,text_prompt_middle,full_model} (fanrena/DPT).

Shapes    B images, N image tokens, P prompts, D width of a tower, E joint channels, K classes, n vectors of context, L
          tokens of a text, G blocks with class-aware prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT
from segvit.contracts import Features, UserError
from segvit.nn.tokens import Step, patch_map
from segvit.text.tokenize import tokenize, word_pieces
from segvit.text.tower import TextTower, end_positions

Position = Literal["front", "middle", "end"]
STD = 0.02  # of new prompts


class TextPrompts(nn.Module):
    """CoOp's sentences: start, context vectors and a class name, a full stop, end.

    `context` is the number n of vectors, or the words that they start from ("a photo of a"). `position` is where the
    name stands among them; `middle` has n // 2 before it. With `class_specific` every class has vectors of its own.
    Underscores in names are read as spaces. Raises UserError for no name, no context and a text that is too long.
    """

    def __init__(
        self, tower: TextTower, names: Sequence[str], *, context: int | str = 16, position: Position = "end",
        class_specific: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        words = " ".join(["X"] * context) if isinstance(context, int) else context
        plain, count = [name.replace("_", " ") for name in names], len(word_pieces(words))
        if not plain or not count:
            raise UserError(f"{len(plain)} classes and {count} context vectors; give one or more of both")
        self.tokens: Tensor
        tokens = tokenize([f"{words} {name}." for name in plain], context_length=tower.context_length)
        self.register_buffer("tokens", tokens, persistent=False)
        order = arrange([len(word_pieces(name)) for name in plain], context=count, length=tokens.shape[1], at=position)
        self.order: Tensor
        self.register_buffer("order", order, persistent=False)
        self.seen = max(len(word_pieces(f"{words} {name}.")) for name in plain) + 2  # tokens up to the last end

        embedded = tower.embed(tokens.to(tower.text_projection.device)).detach()  # (K, L, D)
        self.start: Tensor
        self.register_buffer("start", embedded[:, :1].clone())
        self.rest: Tensor
        self.register_buffer("rest", embedded[:, 1 + count :].clone())
        words_between = embedded[:, 1 : 1 + count] if class_specific else embedded[0, 1 : 1 + count]
        noise = STD * torch.randn_like(words_between)
        self.context = nn.Parameter(noise if isinstance(context, int) else words_between.clone())

    def embeddings(self) -> Tensor:
        """The embedded sentences (K, L, D)."""
        context = self.context.expand(len(self.start), -1, -1)
        sentence = torch.cat([self.start, context, self.rest], dim=1)
        return sentence.gather(1, self.order[..., None].expand_as(sentence))

    def forward(self, tower: TextTower) -> Tensor:
        """The classes' vectors (K, E), not normalised."""
        # What stands behind an end is never seen by it.
        return tower.encode(self.embeddings()[:, : self.seen], end_positions(self.tokens))


def arrange(name_lengths: Sequence[int], *, context: int, length: int, at: Position) -> Tensor:
    """The order (K, L) that takes start, context, name, rest to the one asked for; the end stays where it is.

    Raises UserError for an unknown position.
    """
    before = {"front": 0, "middle": context // 2, "end": context}
    if at not in before:
        raise UserError(f"position is {at!r}; choose from {', '.join(before)}")
    rows, ahead = [], 1 + before[at]
    for size in name_lengths:
        name = range(1 + context, 1 + context + size)
        rows.append([*range(ahead), *name, *range(ahead, 1 + context), *range(name.stop, length)])
    return torch.tensor(rows)


class Generated(NamedTuple):
    """What the generator gives for one block."""

    prompts: Tensor  # (B, P, D)
    logits: Tensor  # (B, P, K), auxiliary: which class each prompt is about
    attention: Tensor  # (B, P, N + extra keys)


class ClassAttention(nn.Module):
    """Class-aware prompts before one block: selected classes look for themselves among the image's tokens."""

    def __init__(self, dim: int, text_dim: int, *, num_classes: int, key_dim: int) -> None:
        super().__init__()
        self.text = nn.Linear(text_dim, dim)
        self.query, self.key = nn.Linear(dim, key_dim, bias=False), nn.Linear(dim, key_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.norm, self.class_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, num_classes, bias=False)

    def forward(self, memory: Tensor, text: Tensor) -> Generated:
        """Memory (B, M, D) and the selected classes' vectors (B, P, E)."""
        classes = self.text(text)
        scores = self.query(classes) @ self.key(memory).mT * self.key.out_features**-0.5
        attention = scores.softmax(-1)
        found = self.value(attention @ memory)
        return Generated(self.norm(found + classes), self.classify(self.class_norm(found)), attention)


class PromptGenerator(nn.Module):
    """The generators of `layers` blocks, each with parameters and `extra_keys` learned tokens of its own."""

    def __init__(
        self, layers: int, dim: int, text_dim: int, *, num_classes: int, key_dim: int = 32, extra_keys: int = 10
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ClassAttention(dim, text_dim, num_classes=num_classes, key_dim=key_dim) for _ in range(layers)
        )
        self.extra = nn.Parameter(STD * torch.randn(layers, extra_keys, dim)) if layers * extra_keys else None

    def forward(self, layer: int, tokens: Tensor, text: Tensor) -> Generated:
        """Tokens (B, N, D), to which no gradient goes, and the selected classes' vectors (B, P, E)."""
        memory = tokens.detach()
        if self.extra is not None:
            memory = torch.cat([memory, self.extra[layer].expand(tokens.shape[0], -1, -1)], dim=1)
        return cast(Generated, self.layers[layer](memory, text))


class VisualPrompts(nn.Module):
    """Prompts of every block of a ViT, taken away behind it: `length` learned ones, and class-aware ones further up.

    `bottom_limit` is the first block with class-aware prompts, counted from 1: the depth gives them to the last block
    alone, depth + 1 to none (VPT-deep). Raises UserError when it lies outside.
    """

    def __init__(
        self, depth: int, dim: int, text_dim: int, *, num_classes: int, bottom_limit: int, length: int = 10,
        key_dim: int = 32, extra_keys: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= bottom_limit <= depth + 1:
            raise UserError(f"bottom_limit is {bottom_limit}; choose 1 to {depth + 1} for {depth} blocks")
        self.plain = bottom_limit - 1  # blocks whose prompts are the same for every image
        self.deep = nn.Parameter(STD * torch.randn(self.plain, length, dim)) if self.plain * length else None
        self.generator = PromptGenerator(
            depth - self.plain, dim, text_dim, num_classes=num_classes, key_dim=key_dim, extra_keys=extra_keys
        )

    def forward(self, vit: PlainViT, step: Step, text: Tensor) -> tuple[Features, list[Tensor]]:
        """Embedded images and the selected classes' vectors (B, P, E) -> features, and G logits (B, P, K).

        All blocks run; maps are those of the backbone's `out_indices`.
        """
        maps, logits = list[Tensor](), list[Tensor]()
        for index in range(len(vit.blocks)):
            prompts: Tensor | None
            if index < self.plain:
                prompts = None if self.deep is None else self.deep[index].expand(step.tokens.shape[0], -1, -1)
            else:
                generated = self.generator(index - self.plain, step.tokens, text)
                prompts = generated.prompts
                logits.append(generated.logits)
            step = vit.run(index, step) if prompts is None else run_with(vit, index, step, prompts)
            if index in vit.out_indices:
                maps.append(patch_map(step))
        return vit.features(maps, vit.gap(len(vit.blocks), step)), logits


def run_with(vit: PlainViT, index: int, step: Step, prompts: Tensor) -> Step:
    """Block `index` with prompts (B, P, D) among its tokens, and the step without them."""
    head, patches = step.tokens[:, : step.prefix], step.tokens[:, step.prefix :]
    prefix = step.prefix + prompts.shape[1]
    longer = vit.run(index, step._replace(tokens=torch.cat([head, prompts, patches], dim=1), prefix=prefix))
    tokens = torch.cat([longer.tokens[:, : step.prefix], longer.tokens[:, prefix:]], dim=1)
    return longer._replace(tokens=tokens, prefix=step.prefix)
