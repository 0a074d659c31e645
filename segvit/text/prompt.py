"""Learned words around class names: vectors before and behind each name, read by a frozen text tower.

Source    CoOp's shared context in zsseg's form: start, `prefix`, the name, `suffix`, a full stop, end.
Checked   tests/golden/zsseg__learnable_prompt (MendelXu/zsseg.baseline text_prompt.py).

Shapes    K classes, L tokens, D width of the text tower, E joint channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from segvit.contracts import UserError
from segvit.text.tokenize import END, START, word_pieces
from segvit.text.tower import TextTower


class LearnedPrompt(nn.Module):
    """Vectors (prefix, D) and (suffix, D), the same for every class."""

    def __init__(self, width: int, *, prefix: int = 16, suffix: int = 0) -> None:
        super().__init__()
        if prefix < 0 or suffix < 0 or prefix + suffix == 0:
            raise UserError(f"a prompt of {prefix} vectors before and {suffix} behind the name; give 1 or more in all")
        self.prefix = nn.Parameter(0.02 * torch.randn(prefix, width))
        self.suffix = nn.Parameter(0.02 * torch.randn(suffix, width))

    def forward(self, tower: TextTower, names: Sequence[str]) -> Tensor:
        """Unit vectors (K, E) of the classes. Raises UserError for no name and for one that is too long."""
        if not names:
            raise UserError("the list of classes is empty; name one class or more")
        rows = [self.sentence(tower, name) for name in names]
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.prefix.device)
        # What stands behind an end is never seen by it, so any padding will do.
        return F.normalize(tower.encode(pad_sequence(rows, batch_first=True), ends), dim=-1)

    def sentence(self, tower: TextTower, name: str) -> Tensor:
        """The embedded tokens of one class (L, D)."""
        pieces, stop = word_pieces(name), word_pieces(".")
        tokens = torch.tensor([START, *pieces, *stop, END], device=self.prefix.device)
        start, words, tail = tower.embed(tokens).split([1, len(pieces), len(stop) + 1])
        return torch.cat([start, self.prefix, words, self.suffix, tail])


def prompt_loss(
    prompt: LearnedPrompt, tower: TextTower, names: Sequence[str], vectors: Tensor, labels: Tensor, *,
    scale: float = 100.0,
) -> Tensor:  # fmt: skip
    """Cross entropy of naming regions by their unit vectors (n, E), `scale` times the cosines; the tower is frozen."""
    return F.cross_entropy(scale * vectors @ prompt(tower, names).mT, labels)


def convert_prompt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """zsseg's `prompt_learner.*` into ours; the signals it stores are rows of the text tower's table."""
    own = {key.rpartition("prompt_learner.")[2]: value for key, value in state.items() if "prompt_learner." in key}
    prefix = own.get("prefix_prompt")
    suffix = own.get("suffix_prompt")
    like = prefix if prefix is not None else suffix
    if like is None:
        raise UserError("no learned prompt in these weights; give a checkpoint that was trained with one")
    nothing = like.new_zeros(0, like.shape[1])
    return {
        "prefix": nothing if prefix is None else prefix,
        "suffix": nothing if suffix is None else suffix,
    }
