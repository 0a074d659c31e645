"""Strings to CLIP's byte-pair token ids, by open_clip's tokenizer and the vocabulary that comes with it (offline).

Checked   tests/golden/clip__tokenizer (official: openai/CLIP clip/clip.py:tokenize).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from segvit.contracts import UserError
from segvit.text.architecture import open_clip_library

START, END, PAD = 49406, 49407, 0
CONTEXT = 77


def tokenize(texts: Sequence[str], *, context_length: int = CONTEXT, truncate: bool = False) -> Tensor:
    """Token ids (n, context_length), int64: start, word pieces, end, then 0.

    Raises UserError for a text that is too long, unless `truncate`, which puts the end in the last place.
    """
    if context_length < 2:
        raise UserError(f"context_length is {context_length}; start and end alone take 2")
    tokens = torch.full((len(texts), context_length), PAD)
    for row, (text, pieces) in enumerate(zip(texts, map(word_pieces, texts), strict=True)):
        room = context_length - 2
        if len(pieces) > room and not truncate:
            raise UserError(
                f"{text!r} has {len(pieces)} word pieces, but {room} is the most here; shorten the name or the template"
            )
        ids = torch.tensor([START, *pieces[:room], END])
        tokens[row, : len(ids)] = ids
    return tokens


def word_pieces(text: str) -> list[int]:
    """The ids of a text alone, without start and end; lower case, white space collapsed."""
    ids: list[int] = _tokenizer().encode(text)
    return ids


@cache
def _tokenizer() -> Any:
    return open_clip_library().SimpleTokenizer()
