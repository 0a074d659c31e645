"""Bands of rows against the whole resize, mask mixing, and the packed attention against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from segvit.contracts import Dense
from segvit.nn.attention import Attention, init_packed, join_heads, split_heads
from segvit.nn.readout import bilinear_rows, logit_rows, mix_masks, source_rows

sides = st.integers(1, 40)


def maps_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(sides, sides, sides, sides, st.data())
def test_bands_equal_the_rows_of_a_full_resize(h: int, w: int, height: int, width: int, data: st.DataObject) -> None:
    maps = maps_of(h, w)
    start = data.draw(st.integers(0, height - 1))
    rows = range(start, data.draw(st.integers(start + 1, height)))
    whole = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    band = bilinear_rows(maps, (height, width), rows)
    assert band.shape == (2, 3, len(rows), width)
    torch.testing.assert_close(band, whole[:, :, rows.start : rows.stop], atol=3e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10), st.data())
def test_a_part_of_the_map_is_enough(h: int, height: int, seed: int, data: st.DataObject) -> None:
    maps, width = maps_of(h, 5, seed), 7
    start = data.draw(st.integers(0, height - 1))
    rows = range(start, data.draw(st.integers(start + 1, height)))
    above, _ = source_rows(h, height, rows)
    first, last = (int(above[0]), min(int(above[-1]) + 1, h - 1)) if h != height else (rows.start, rows.stop - 1)
    assume(first <= last)
    part = maps[:, :, first : last + 1]
    band = bilinear_rows(part, (height, width), rows, height=h, first=first)
    torch.testing.assert_close(band, bilinear_rows(maps, (height, width), rows), atol=0, rtol=0)


@given(st.integers(1, 500), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_source_rows_stay_inside(h: int, height: int) -> None:
    above, blend = source_rows(h, height, range(height))
    assert ((above >= 0) & (above < h)).all()
    assert ((blend >= 0) & (blend <= 1)).all()
    assert (above[1:] >= above[:-1]).all()


def test_same_size_is_a_view() -> None:
    maps = maps_of(6, 5)
    assert bilinear_rows(maps, (6, 5), range(2, 4)).data_ptr() == maps[:, :, 2:].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert bilinear_rows(maps_of(3, 4).to(dtype), (8, 9), range(2, 5)).dtype == dtype


def test_gradients_flow_through_bands() -> None:
    whole, banded = maps_of(3, 4).requires_grad_(), maps_of(3, 4).requires_grad_()
    F.interpolate(whole, size=(10, 11), mode="bilinear", align_corners=False).square().sum().backward()
    sum(bilinear_rows(banded, (10, 11), range(i, i + 5)).square().sum() for i in (0, 5)).backward()
    torch.testing.assert_close(whole.grad, banded.grad, atol=1e-4, rtol=1e-4)


def test_logits_are_resized_over_what_they_cover() -> None:
    out = Dense(maps_of(3, 4), {}, (24, 32))
    full = F.interpolate(out.logits, size=(24, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logit_rows(out, (20, 27), range(4, 20)), full[:, :, 4:20, :27], atol=1e-6, rtol=1e-5)


def test_mix_masks() -> None:
    classes, masks = torch.rand(2, 5, 3), torch.rand(2, 5, 4, 6)
    torch.testing.assert_close(mix_masks(classes, masks), torch.einsum("bqk,bqhw->bkhw", classes, masks))


@pytest.mark.parametrize("with_memory", [False, True])
def test_attention_is_torchs_with_the_same_packed_weights(with_memory: bool) -> None:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(24, 4, batch_first=True).double()
    ours = Attention(24, heads=4).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn_like(parameter))
        ours.qkv.weight.copy_(reference.in_proj_weight)
        ours.qkv.bias.copy_(reference.in_proj_bias)
        ours.proj.weight.copy_(reference.out_proj.weight)
        ours.proj.bias.copy_(reference.out_proj.bias)
    queries, memory = torch.randn(2, 5, 24).double(), torch.randn(2, 9, 24).double()
    source = memory if with_memory else queries
    expected, _ = reference(queries, source, source, need_weights=True)
    torch.testing.assert_close(ours(queries, memory if with_memory else None), expected)


def test_attention_starts_like_torchs() -> None:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(128, 4)
    ours = Attention(128, heads=4)
    init_packed(ours)
    assert ours.qkv.weight.std().item() == pytest.approx(reference.in_proj_weight.std().item(), rel=0.02)
    assert torch.equal(ours.qkv.bias, reference.in_proj_bias)


def test_dropout_acts_in_training_only() -> None:
    layer, x = Attention(8, heads=2, dropout=0.5), torch.randn(1, 4, 8)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_heads_split_and_join() -> None:
    x = torch.randn(2, 5, 12)
    parts = split_heads(x, 3)
    assert parts.shape == (2, 3, 5, 4)
    assert torch.equal(parts[:, 1], x[..., 4:8])
    assert torch.equal(join_heads(parts), x)
