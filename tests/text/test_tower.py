"""The text tower against open_clip's, its context vectors, and its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segvit.contracts import UserError
from segvit.text.architecture import TextConfig
from segvit.text.tokenize import tokenize
from segvit.text.tower import TextTower, end_positions, insert_context, text_tower
from tests.text.clips import clip_file, tiny_clip

TOKENS = ["a photo of a cat.", "road", "traffic light"]


@pytest.fixture
def tower(tmp_path: Path) -> TextTower:
    return text_tower(None, weights=str(clip_file(tmp_path / "clip.safetensors"))).eval()


@torch.no_grad()
def test_equals_open_clip(tower: TextTower) -> None:
    tokens = tokenize(TOKENS)
    expected = tiny_clip().encode_text(tokens)
    torch.testing.assert_close(tower(tokens), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower(tokens[:, :10]), expected, rtol=1e-5, atol=1e-5)  # what follows the end is unseen
    torch.testing.assert_close(tower(tokens[0]), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower(tokens.expand(2, -1, -1))[1], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_context_of_words_equals_the_words(tower: TextTower) -> None:
    """The embeddings of "a photo of" put before the name are the sentence, for all, by class and by image."""
    tokens = tokenize(["cat", "traffic light"])
    words, ends = tower.embed(tokens[:, :-3]), end_positions(tokens) + 3
    context = tower.embed(tokenize(["a photo of"])[0, 1:4])
    expected = tower(tokenize(["a photo of cat", "a photo of traffic light"]))
    for given in (context, context.expand(2, -1, -1), context.expand(3, 1, -1, -1)):
        found = tower.encode(insert_context(words, given), ends)
        assert found.shape == (*given.shape[:-3], 2, tower.embed_dim) if given.ndim == 4 else (2, tower.embed_dim)
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-5)
    behind = tower.encode(insert_context(tower.embed(tokenize(["a cat"])[:, :-1]), tower.embed(tokens[1:, 1]), at=2),
                          torch.tensor([4]))  # fmt: skip
    torch.testing.assert_close(behind, tower(tokenize(["a traffic cat"])), rtol=1e-5, atol=1e-5)


def test_too_many_tokens_are_refused(tower: TextTower) -> None:
    words = tower.embed(tokenize(["cat"]))
    with pytest.raises(UserError, match="78 tokens does not fit into 77"):
        tower.encode(insert_context(words, words[0, :1]), torch.tensor([3]))


def test_a_shorter_tower_keeps_the_first_positions(tmp_path: Path, tower: TextTower) -> None:
    path = str(clip_file(tmp_path / "clip.safetensors"))
    short = text_tower(None, weights=path, context_length=13).eval()
    assert short.positional_embedding.shape == (13, 64)
    tokens = tokenize(TOKENS, context_length=13)
    torch.testing.assert_close(short(tokens), tower(tokens), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="choose 2 to 77"):
        text_tower(None, weights=path, context_length=78)


def test_the_count_of_the_card() -> None:
    """ViT-B/16's 149.62 M are the image tower's 86.19 M, this and the scale."""
    with torch.device("meta"):
        tower = TextTower(TextConfig(width=512, layers=12, heads=8, embed_dim=512))
    assert sum(parameter.numel() for parameter in tower.parameters()) == 149_620_737 - 86_192_640 - 1
