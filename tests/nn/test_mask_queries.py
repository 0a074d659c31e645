"""The mask decoder's parts that the golden cases leave open."""

from __future__ import annotations

import math

import pytest
import torch

from segvit.contracts import UserError
from segvit.nn.mask_queries import PixelDecoder, QueryDecoder, sine_places


def test_places_of_rows_come_first_and_end_with_a_full_turn() -> None:
    places = sine_places((3, 5), 8).unflatten(0, (3, 5))
    assert torch.equal(places[0, 0, :4], places[0, 4, :4])
    assert torch.equal(places[0, 2, 4:], places[2, 2, 4:])
    torch.testing.assert_close(places[2, 4, :2], torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(places[0, 0, 0], torch.tensor(math.sin(2 * math.pi / 3)), atol=1e-5, rtol=0)


def test_every_layer_has_embeddings_and_masks() -> None:
    decoder = QueryDecoder(
        8, 16, queries=5, layers=3, heads=2, hidden=32, mask_dim=6, embed_dim=4, embed_hidden=9, embed_layers=1
    ).eval()
    outputs = decoder(torch.rand(2, 8, 3, 4), torch.rand(2, 6, 9, 7))
    assert [(e.shape, m.shape) for e, m in outputs] == [((2, 5, 4), (2, 5, 9, 7))] * 3


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="multiple of 32"):
        PixelDecoder([8, 8], 24, 8)
    with pytest.raises(UserError, match="heads"):
        QueryDecoder(8, 16, queries=5, layers=1, heads=3, hidden=32, mask_dim=6, embed_dim=4, embed_hidden=9)
