"""Token ids, room, and what is too long; the golden case compares with the official tokenizer."""

from __future__ import annotations

import sys

import pytest
import torch

from segvit.contracts import UserError
from segvit.text.tokenize import END, PAD, START, tokenize, word_pieces


def test_a_row_is_start_pieces_end_padding() -> None:
    tokens = tokenize(["street lamp", ""], context_length=6)
    assert tokens.dtype == torch.int64
    lamp = word_pieces("street lamp")
    assert tokens.tolist() == [[START, *lamp, END, PAD, PAD], [START, END, PAD, PAD, PAD, PAD]]


def test_case_and_white_space_do_not_matter() -> None:
    assert word_pieces("  Traffic \n LIGHT ") == word_pieces("traffic light")


def test_too_long_is_an_error_unless_cut() -> None:
    with pytest.raises(UserError, match="has 3 word pieces, but 2 is the most"):
        tokenize(["a street lamp"], context_length=4)
    assert tokenize(["a street lamp"], context_length=4, truncate=True)[0, -1] == END
    assert tokenize(["a street lamp"], context_length=5)[0, -1] == END
    with pytest.raises(UserError, match="context_length"):
        tokenize(["a"], context_length=1)


def test_without_open_clip_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from segvit.text.architecture import open_clip_library

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'segvit\[clip\]'"):
        open_clip_library()
