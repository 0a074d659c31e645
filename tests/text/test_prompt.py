"""Learned prompts beside what the text tower makes of the same tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segvit.contracts import UserError
from segvit.text.architecture import TextConfig
from segvit.text.prompt import LearnedPrompt, convert_prompt, prompt_loss
from segvit.text.tokenize import tokenize, word_pieces
from segvit.text.tower import TextTower


@pytest.fixture
def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextConfig(width=16, layers=2, heads=2, embed_dim=8)).eval()


@pytest.mark.parametrize(("prefix", "suffix"), [(2, 0), (0, 1), (2, 1)])
def test_words_as_prompts_give_the_sentence(tower: TextTower, prefix: int, suffix: int) -> None:
    words = ["red", "big"][:prefix] + ["potted plant"] + ["outside"][:suffix]
    prompt = LearnedPrompt(16, prefix=prefix, suffix=suffix)
    with torch.no_grad():
        for part, names in ((prompt.prefix, words[:prefix]), (prompt.suffix, words[prefix + 1 :])):
            ids = torch.tensor([word_pieces(name)[0] for name in names], dtype=torch.long)
            part.copy_(tower.embed(ids))
        expected = tower(tokenize([" ".join(words) + ".", "cat"]))[:1]
        found = prompt(tower, ["potted plant", "a much longer name of a class"])[:1]
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)


def test_prompts_learn_to_name_regions_while_the_tower_stays(tower: TextTower) -> None:
    tower.requires_grad_(False)
    prompt, names, vectors = LearnedPrompt(16, prefix=4), ["cat", "sea"], F.normalize(torch.randn(2, 8), dim=-1)
    optimizer, losses = torch.optim.Adam(prompt.parameters(), lr=0.02), []
    for _ in range(20):
        loss = prompt_loss(prompt, tower, names, vectors, torch.tensor([1, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.8 * losses[0]
    assert prompt.prefix.grad is not None


def test_official_prompts_without_suffix() -> None:
    state = {"clip_adapter.prompt_learner.prefix_prompt": torch.ones(3, 4), "other": torch.ones(1)}
    assert {key: value.shape for key, value in convert_prompt(state).items()} == {"prefix": (3, 4), "suffix": (0, 4)}
    with pytest.raises(UserError, match="no learned prompt"):
        convert_prompt({"other": torch.ones(1)})


def test_what_is_no_prompt(tower: TextTower) -> None:
    with pytest.raises(UserError, match="1 or more"):
        LearnedPrompt(16, prefix=0)
    with pytest.raises(UserError, match="empty"):
        LearnedPrompt(16)(tower, [])
