"""CLIP's text tower: token ids, or embeddings with learned context among them, to vectors of the joint space.

Paper     A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
Keys      the official ones; `logit_scale` belongs to both towers and is not here.
Checked   tests/golden/clip__{vit,resnet}_towers, zegclip__text_encoder, denseclip__text_context_encoder.

Shapes    K texts, L tokens, D width, E joint channels, n context vectors; `...` any leading axes, such as images.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn

from segvit.contracts import UserError
from segvit.text.architecture import TextConfig
from segvit.text.checkpoint import Checkpoint, find_clip

NOT_TEXT = ("visual.", "logit_scale", "logit_bias")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), which OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm transformer block in which a token sees itself and those before it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        activation = QuickGELU() if config.quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=activation, c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask, is_causal=True)[0]
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """The blocks, under their official name."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        for block in self.resblocks:
            x = block(x, mask)
        return x


class TextTower(nn.Module):
    """Texts of up to `context_length` tokens to vectors of `embed_dim` channels, not normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.embed_dim, self.context_length = config.width, config.embed_dim, config.context_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, config.embed_dim))
        init_text(self)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (..., L) -> their embeddings (..., L, D), before positions are added."""
        return cast(Tensor, self.token_embedding(tokens))

    def encode(self, embeddings: Tensor, ends: Tensor) -> Tensor:
        """Embeddings (..., L, D) and the place of the end in each, broadcast to (...) -> vectors (..., E).

        Raises UserError when L is more than there are positions.
        """
        lead, length = embeddings.shape[:-2], embeddings.shape[-2]
        if length > self.context_length:
            raise UserError(
                f"a text of {length} tokens does not fit into {self.context_length}; use fewer context tokens"
            )
        x = embeddings.reshape(-1, length, self.width)
        x = self.ln_final(self.transformer(x + self.positional_embedding[:length]))
        last = x[torch.arange(len(x), device=x.device), ends.expand(lead).reshape(-1)]
        return cast(Tensor, (last @ self.text_projection).reshape(*lead, self.embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (..., L) -> vectors (..., E)."""
        return self.encode(self.embed(tokens), end_positions(tokens))


def end_positions(tokens: Tensor) -> Tensor:
    """Where the end token, the highest id, stands in each row: (..., L) -> (...)."""
    return tokens.argmax(-1)


def insert_context(words: Tensor, context: Tensor, *, at: int = 1) -> Tensor:
    """Put context vectors (..., n, D) before token `at` of embedded texts (..., L, D): (..., n + L, D).

    Leading axes are broadcast: (n, D) for all texts, (K, n, D) for each class, (B, 1, n, D) for each image. With the
    default they stand behind the start token. The place of an end behind them moves by n.
    """
    lead = torch.broadcast_shapes(words.shape[:-2], context.shape[:-2])
    words, context = words.expand(*lead, *words.shape[-2:]), context.expand(*lead, *context.shape[-2:])
    return torch.cat([words[..., :at, :], context, words[..., at:, :]], dim=-2)


def init_text(tower: TextTower) -> None:
    """OpenAI's initialisation, for towers that are trained from nothing."""
    width, layers = tower.config.width, tower.config.layers
    nn.init.normal_(tower.token_embedding.weight, std=0.02)
    nn.init.normal_(tower.positional_embedding, std=0.01)
    nn.init.normal_(tower.text_projection, std=width**-0.5)
    for block in cast("list[Block]", list(tower.transformer.resblocks)):
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.get_parameter("c_fc.weight"), std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.get_parameter("c_proj.weight"), std=width**-0.5 * (2 * layers) ** -0.5)


def convert_text(state: dict[str, Tensor], *, context_length: int | None = None) -> dict[str, Tensor]:
    """The text tower's part of an official state dict; of its positions the first `context_length`."""
    own = {key: value for key, value in state.items() if not key.startswith(NOT_TEXT)}
    if context_length is not None and "positional_embedding" in own:
        own["positional_embedding"] = own["positional_embedding"][:context_length]
    return own


def text_tower(
    model: str | dict[str, Any] | None, *, weights: str | None = None, quick_gelu: bool | None = None,
    context_length: int | None = None,
) -> TextTower:  # fmt: skip
    """The text tower of a name of open_clip, or of the weights alone; see `find_clip` for the arguments.

    `context_length` keeps only the first positions. Raises UserError when weights cannot be had or do not fit.
    """
    return build_text(find_clip(model, weights, quick_gelu=quick_gelu), context_length=context_length)


def build_text(found: Checkpoint, *, context_length: int | None = None) -> TextTower:
    """The text tower of what `find_clip` found, with its weights where there are any."""
    config = found.text_config(context_length)
    tower = TextTower(config)
    if found.state is not None:
        found.load(tower, convert_text(found.state, context_length=config.context_length))
    return tower
