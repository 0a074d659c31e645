"""Blocks of output pixels: which low-resolution mask cells each depends on, and with what weights.

An axis of the output is cut where the cell of the mask below changes and where windows begin or end. What follows is
linear and separable, so rows and columns are planned alone: masks -> the network's input -> the average over windows ->
the original size.

Shapes    G groups along an axis, R output pixels of the longest, I input pixels below it, F mask cells below these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segvit.nn.readout import source_rows

LONGEST = 32  # output pixels of a group


class Part(NamedTuple):
    """One window along one axis, for the groups `start` to `stop` that read it."""

    start: int
    stop: int
    cells: Tensor  # (G, F) mask cells that a group reads; where there are fewer, the last one again
    blend: Tensor  # (G, I, F) float64 bilinear weights of the cells at each input pixel
    resize: Tensor | None  # (G, R, I) float64 weights of the input pixels, shared among windows; None = share alone
    share: Tensor  # (G,) of this window in the average, of groups below which the windows are the same everywhere


class Axis(NamedTuple):
    """The groups along one axis and, for each window along it, what they read."""

    start: NDArray[np.int64]  # (G,) first output pixel
    lengths: NDArray[np.int64]  # (G,) pixels of each
    even: Tensor  # (G,) bool: the same windows everywhere below the group
    taps: Tensor  # (G, R, 2) the two input pixels of each output pixel, counted from the group's first
    parts: list[Part]
    windows: range  # the numbers of the parts among all windows

    @property
    def longest(self) -> int:
        """Output pixels of the longest group."""
        return int(self.taps.shape[1])


def plan_axis(outputs: range, length: int, spans: Sequence[tuple[int, int]], cells: int, covers: int) -> Axis:
    """Cut `outputs` of an axis that is `length` long in all.

    `spans` are the windows' first and last + 1 pixels, in order and of one size; the masks below each have `cells`
    over `covers` pixels.
    """
    starts, stops = (np.array(ends) for ends in zip(*spans, strict=True))
    inner, same = int(stops[-1]), length == int(stops[-1])
    upper, weight = source_rows(inner, length, outputs)
    lower = upper if same else np.minimum(upper + 1, inner - 1)
    pixel = np.arange(inner)
    first, last = np.searchsorted(stops, pixel, "right"), np.searchsorted(starts, pixel, "right") - 1
    cell = np.floor((pixel - starts[first] + 0.5) * cells / covers - 0.5)
    keys = np.stack([first, last, cell])[:, upper]
    cuts = np.flatnonzero(np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(0)])
    run = np.diff(np.r_[cuts, len(outputs)])
    start = np.concatenate([np.arange(a, a + n, LONGEST) for a, n in zip(cuts, run, strict=True)])
    count = np.diff(np.r_[start, len(outputs)])
    number = np.minimum(start[:, None] + np.arange(count.max()), (start + count - 1)[:, None])  # (G, R)
    low, high = upper[start], lower[start + count - 1]  # the input pixels below each group
    taps = np.stack([upper[number], lower[number]], -1) - low[:, None, None]
    grid = Grid(low, high, taps, np.where(same, 0, weight[number]), 1 / (last - first + 1))
    table = source_rows(cells, covers, range(covers))
    used = range(int(first[low[0]]), int(last[high[-1]]) + 1)
    parts = [_part(grid, spans[w], cells, table, same=same) for w in used]
    even = (first[low] == first[high]) & (last[low] == last[high])
    return Axis(start + outputs.start, count, torch.from_numpy(even), torch.from_numpy(taps), parts, used)


class Grid(NamedTuple):
    """What all windows of an axis share."""

    low: NDArray[np.int64]  # (G,) first input pixel of a group
    high: NDArray[np.int64]  # (G,) last one
    taps: NDArray[np.int64]  # (G, R, 2)
    weight: NDArray[np.float64]  # (G, R) of the second tap
    part: NDArray[np.float64]  # (input pixels,) share of each window that covers the pixel


def _part(
    grid: Grid, span: tuple[int, int], cells: int, table: tuple[NDArray[np.int64], NDArray[np.float64]], *, same: bool
) -> Part:
    touched = np.flatnonzero((grid.high >= span[0]) & (grid.low < span[1]))
    begin, end = int(touched[0]), int(touched[-1]) + 1
    low, high = grid.low[begin:end, None], grid.high[begin:end, None]
    width = int((grid.high - grid.low).max()) + 1
    pixel = low + np.arange(width)  # (G, I)
    inside = np.clip(pixel, np.maximum(low, span[0]), np.minimum(high, span[1] - 1)) - span[0]
    upper, weight = table[0][inside], table[1][inside]
    lower = np.minimum(upper + 1, cells - 1)
    first, last = upper[:, :1], lower.max(1, keepdims=True)
    footprint = int((last - first).max()) + 1
    blend = np.zeros((*pixel.shape, footprint))
    group, place = np.indices(pixel.shape)
    np.add.at(blend, (group, place, upper - first), 1 - weight)
    np.add.at(blend, (group, place, lower - first), weight)
    share = grid.part[np.maximum(grid.low[begin:end], span[0])]
    resize = None
    if not same:
        taps, second = grid.taps[begin:end], grid.weight[begin:end]
        resize = np.zeros((*second.shape, width))
        group, place = np.indices(second.shape)
        for tap, amount in ((taps[..., 0], 1 - second), (taps[..., 1], second)):
            source = low + tap
            np.add.at(
                resize, (group, place, tap), amount * grid.part[source] * (source >= span[0]) * (source < span[1])
            )
    return Part(
        begin, end, torch.from_numpy(np.minimum(first + np.arange(footprint), last)), torch.from_numpy(blend),
        None if resize is None else torch.from_numpy(resize), torch.from_numpy(share),
    )  # fmt: skip
