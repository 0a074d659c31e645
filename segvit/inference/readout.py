"""Labels of mask classification without computing the classes that cannot win; equal to the dense readout's.

Idea      Bilinear interpolation lies between its cells, the sigmoid is monotone, class weights are not negative and
          averages and resizes are convex: the least and largest mask below a block of pixels bound each class score
          there. One class left: the block is its. Else the few classes left are computed, and of the queries only those
          that vary enough to matter; the others count as their middle, with half their range as the error.
Exact     A pixel is decided when the gap to the second class exceeds all that was left out and all rounding, ours and
          the dense readout's (`rounding`). The pixels that remain are computed in float64 with all queries, and what is
          a tie even then takes the labels of the dense band around it, computed as ever: the first class wins.

Shapes    K classes, Q queries, h w mask cells, G H groups of pixels along rows and columns (`blocks`), n blocks or
          pixels of a list, C classes and A queries computed for each, R S output pixels of a block, I J input pixels
          below it, F cells below a group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from segvit.contracts import Dense, MaskScores, Size
from segvit.inference.blocks import Axis, Part, plan_axis
from segvit.inference.rounding import BLENDING, SMALLEST, mixing, rounding
from segvit.inference.windows import WindowedScores

LARGEST = 1e4  # mask logits; beyond, rounding is no longer small against the sigmoid's slope
LEAST_BLOCK = 9.0  # pixels of a mean block below which bounds cost more than they save
MOST_OPEN = 0.12  # share of (block, class) pairs left by the bounds above which the dense readout is as fast
MOST_CLOSE = 0.05  # share of pixels for float64 above which the dense readout is as fast
HELD = 500_000  # bounds held at once (classes x blocks)
CHUNK = 1_000_000  # scores held at once
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1 << 30)  # classes computed at once for a block
NEGLIGIBLE = 1e-3  # weight x half range of a mask below which its middle stands for it, in parts of the block's best


class Source(NamedTuple):
    """One window's masks, where they lie in the strip, and their bounds there."""

    rows: Part
    columns: Part
    masks: Tensor  # (Q, h, w)
    weights: Tensor | None  # (K, Q)
    offset: Tensor | None  # (K,)
    low: Tensor  # (Q, G, H) least mask probability below each block
    high: Tensor  # (Q, G, H)
    largest: float  # mask logit of the strip, either sign


class Strip(NamedTuple):
    """A strip of output rows: its blocks and the bounds of every class in them."""

    rows: Axis
    columns: Axis
    sources: list[Source]
    low: Tensor  # (K, G, H)
    high: Tensor  # (K, G, H)
    rounding: float  # error of a score with exact mask logits, in parts of its masks' sum and its offset
    blending: float  # what the interpolation of the mask logits adds
    shift: float  # largest offset


class Chosen(NamedTuple):
    """Blocks or single pixels of them, and the classes that may win there."""

    row: Tensor  # (n,) group
    column: Tensor  # (n,)
    classes: Tensor  # (n, C)
    pixel: tuple[Tensor, Tensor] | None = None  # (n,) and (n,) row and column in the block; None = all


@dataclass
class PrunedLabels:
    """Labels of an image resized to `size`, strip by strip from the top; see `prunable` for when.

    They equal the arg max of `view.rows_at` over bands of `step` rows. That is also what computes the strips in which
    pruning would not pay.
    """

    view: WindowedScores
    size: Size
    step: int
    describe: Callable[[Dense], MaskScores | None]
    grid: Size  # mask cells of a window
    covers: Size

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        view, size, step = self.view, self.size, self.step
        lefts = [(box.left, box.right) for box in view.boxes[0]]
        columns = plan_axis(range(size[1]), size[1], lefts, self.grid[1], self.covers[1])
        groups = max(1.0, HELD / (len(view.run.classes) * len(columns.start)))  # of rows in a strip
        height = step * max(1, round(groups * self.block[0] / step))
        for top in range(0, size[0], height):
            rows = range(top, min(top + height, size[0]))
            bands = [range(start, min(start + step, rows.stop)) for start in range(top, rows.stop, step)]
            strip = self.bounds(rows, columns)
            found = decide(strip) if strip else None
            if found is None:
                yield from ((band, self.dense(band)) for band in bands)
                continue
            labels, close = found
            for band in bands:
                inside = slice(band.start - top, band.stop - top)
                if close[inside].any():
                    labels[inside] = self.dense(band)
            yield rows, labels

    @property
    def block(self) -> tuple[float, float]:
        """Output pixels above a mask cell."""
        down, across = (max(1.0, self.covers[i] / self.grid[i] * self.size[i] / self.view.size[i]) for i in range(2))
        return down, across

    def dense(self, rows: range) -> Tensor:
        """Labels of a band of rows by all scores."""
        return best_class(self.view.rows_at(self.size, rows))

    def bounds(self, rows: range, columns: Axis) -> Strip | None:
        """Bounds of all scores in a strip of output rows; None for masks and weights for which they would not hold."""
        view = self.view
        tops = [(boxes[0].top, boxes[0].bottom) for boxes in view.boxes]
        down = plan_axis(rows, self.size[0], tops, self.grid[0], self.covers[0])
        for number in [number for number in view.outputs if number < down.windows.start]:
            del view.outputs[number]
        sources = []
        for number, part in zip(down.windows, down.parts, strict=True):
            for column, out in zip(columns.parts, view.row_outputs(number), strict=True):
                found = self.describe(out)
                source = _source(found, part, column) if found else None
                if source is None:
                    return None
                sources.append(source)
        low, high = _combined(sources, down, columns)
        shift = max(float(source.offset.abs().max()) if source.offset is not None else 0.0 for source in sources)
        queries = 0 if sources[0].weights is None else len(sources[0].masks)
        blending = BLENDING * max(source.largest for source in sources)
        return Strip(down, columns, sources, low, high, rounding(queries, len(sources)), blending, shift)


def prunable(view: WindowedScores, size: Size, step: int) -> PrunedLabels | None:
    """The pruned readout of a view at `size`, or None where its scores are no sums of masks or cells are too small."""
    describe = view.run.readout.masks
    # Coarser matrix products err by more than `rounding` says.
    if describe is None or torch.get_float32_matmul_precision() != "highest":
        return None
    out = view.row_outputs(0)[0]
    found = describe(out)
    if found is None or not found.masks.is_cpu or found.masks.dtype != torch.float32:
        return None
    grid = (found.masks.shape[-2], found.masks.shape[-1])
    pruned = PrunedLabels(view, size, step, describe, grid, out.covers)
    return pruned if math.prod(pruned.block) >= LEAST_BLOCK else None


def best_class(band: Tensor) -> Tensor:
    """The class of the highest score, the first one on ties: (K, R, W) -> (R, W) uint8, or int32 above 255 classes."""
    return band.max(0).indices.to(torch.uint8 if len(band) <= 255 else torch.int32)


def _source(found: MaskScores, rows: Part, columns: Part) -> Source | None:
    masks = found.masks[0]
    weights = found.weights[0].mT.contiguous() if found.weights is not None else None
    offset = found.offset[0] if found.offset is not None else None
    top = int(rows.cells.min())
    part = masks[:, top : int(rows.cells.max()) + 1]
    # Comparisons are false for NaN, which spoils whole rows of the dense readout.
    largest = part.abs().max()
    fine = largest < LARGEST and (offset is None or offset.abs().max() < LARGEST)
    if not (fine and (weights is None or (weights.min() >= 0 and weights.max() < LARGEST))):
        return None
    low = high = part.sigmoid()
    for axis, cells in ((1, rows.cells - top), (2, columns.cells)):
        # Neighbours first, then the groups that begin there: slices are far faster than choosing.
        length = low.shape[axis] - cells.shape[1] + 1
        low = reduce(torch.minimum, (low.narrow(axis, start, length) for start in range(cells.shape[1])))
        high = reduce(torch.maximum, (high.narrow(axis, start, length) for start in range(cells.shape[1])))
        place = cells[:, 0].clamp(max=length - 1)
        low, high = low.index_select(axis, place), high.index_select(axis, place)
    return Source(rows, columns, masks, weights, offset, low, high, float(largest))


def _combined(sources: list[Source], rows: Axis, columns: Axis) -> tuple[Tensor, Tensor]:
    """Bounds (K, G, H): the mean of the windows' bounds, or their hull where not all of them cover all of a block."""
    pairs = [tuple(_mixed(source, masks) for masks in (source.low, source.high)) for source in sources]
    if len(sources) == 1:
        return pairs[0][0], pairs[0][1]
    shape = (len(pairs[0][0]), len(rows.start), len(columns.start))
    mean, hull = pairs[0][0].new_zeros(2, *shape), pairs[0][0].new_full((2, *shape), torch.inf)
    for source, (low, high) in zip(sources, pairs, strict=True):
        inside = (slice(None), slice(source.rows.start, source.rows.stop),
                  slice(source.columns.start, source.columns.stop))  # fmt: skip
        share = (source.rows.share[:, None] * source.columns.share).to(low.dtype)
        for side, sign, values in ((0, 1, low), (1, -1, high)):
            mean[side][inside] += share * values
            hull[side][inside] = torch.minimum(hull[side][inside], sign * values)
    even = rows.even[:, None] & columns.even
    return torch.where(even, mean[0], hull[0]), torch.where(even, mean[1], -hull[1])


def _mixed(source: Source, masks: Tensor) -> Tensor:
    """Class scores of mask probabilities (Q, G, H)."""
    scores = masks if source.weights is None else (source.weights @ masks.flatten(1)).unflatten(1, masks.shape[1:])
    return scores if source.offset is None else scores - source.offset[:, None, None]


def decide(strip: Strip) -> tuple[Tensor, Tensor] | None:
    """Labels of a strip (R, W) and which rows (R,) hold a pixel too close to call; None where pruning does not pay."""
    peak = strip.low.amax(0)
    slack = 4 * (strip.rounding + strip.blending) * (peak.abs() + 4 * strip.shift) + SMALLEST
    left = (strip.high >= peak - slack).float()  # classes that may win
    numbers = torch.arange(len(left), dtype=left.dtype)
    # How many are left, and which where it is one: a product with (1, id) is faster than counting.
    tally = (torch.stack([torch.ones_like(numbers), numbers]) @ left.flatten(1)).unflatten(1, left.shape[1:])
    todo = (tally[0] > 1).nonzero()
    counts = tally[0, todo[:, 0], todo[:, 1]].long()
    if counts.sum() > MOST_OPEN * left.numel():
        return None
    labels = torch.where(tally[0] > 1, 0, tally[1]).to(torch.uint8 if len(left) <= 255 else torch.int32)
    for axis, groups in ((1, strip.columns), (0, strip.rows)):
        labels = labels.repeat_interleave(torch.from_numpy(groups.lengths), axis)
    close = torch.zeros(len(labels), dtype=torch.bool)
    allowed, area = MOST_CLOSE * labels.numel(), strip.rows.longest * strip.columns.longest
    order = counts.argsort()
    todo, counts = todo[order], counts[order].tolist()
    start = 0
    while start < len(counts):
        width = min(len(strip.high), next(size for size in SIZES if size >= counts[start]))
        stop = min(bisect_right(counts, width), start + max(1, CHUNK // (width * area)))
        row, column = todo[start:stop].unbind(1)
        classes = strip.high[:, row, column].topk(width, 0, sorted=False).indices.mT
        near = _fill(strip, Chosen(row, column, classes), labels)
        allowed -= len(near.row)
        if allowed < 0:
            return None
        _settle(strip, near, labels, close)
        start = stop
    return labels, close


def _fill(strip: Strip, blocks: Chosen, labels: Tensor) -> Chosen:
    """Labels of blocks into `labels`; the pixels for which float32 and the queries left out do not suffice."""
    scores, error = _scores(strip, blocks, torch.float32)
    first, second, winner = _two_best(scores)
    top = strip.high[:, blocks.row, blocks.column].amax(0)
    # Ours and the dense readout's rounding, here in parts of the largest score that is possible in the block.
    slack = 2 * error + 8 * (strip.rounding + strip.blending) * (top.abs() + 4 * strip.shift) + SMALLEST
    place = [
        torch.from_numpy(axis.start)[group, None]
        + torch.minimum(torch.arange(axis.longest), torch.from_numpy(axis.lengths)[group, None] - 1)
        for axis, group in ((strip.rows, blocks.row), (strip.columns, blocks.column))
    ]
    place[0] -= int(strip.rows.start[0])
    labels[place[0][:, :, None], place[1][:, None]] = (
        blocks.classes.gather(1, winner.flatten(1)).view_as(winner).to(labels.dtype)
    )
    number, down, across = (first - second <= slack[:, None, None]).nonzero().unbind(1)
    row, column, classes = (part[number] for part in blocks[:3])
    heights, widths = torch.from_numpy(strip.rows.lengths), torch.from_numpy(strip.columns.lengths)
    real = (down < heights[row]) & (across < widths[column])  # the rest repeats a block's last row or column
    return Chosen(row[real], column[real], classes[real], (down[real], across[real]))


def _settle(strip: Strip, pixels: Chosen, labels: Tensor, close: Tensor) -> None:
    """Labels of pixels from float64; `close` marks the rows of those that rounding decides in the dense readout."""
    assert pixels.pixel is not None
    size = max(1, CHUNK // (4 * len(strip.sources[0].masks)))
    for start in range(0, len(pixels.row), size):
        row, column, classes = (part[start : start + size] for part in pixels[:3])
        down, across = (part[start : start + size] for part in pixels.pixel)
        scores, error = _scores(strip, Chosen(row, column, classes, (down, across)), torch.float64)
        first, second, winner = (part[:, 0, 0] for part in _two_best(scores))
        y = torch.from_numpy(strip.rows.start)[row] + down - int(strip.rows.start[0])
        x = torch.from_numpy(strip.columns.start)[column] + across
        labels[y, x] = classes.gather(1, winner[:, None])[:, 0].to(labels.dtype)
        rest = rounding(0, len(strip.sources))  # what mixes the queries is part of `error`
        slack = 2 * (error + rest * (first.abs() + 4 * strip.shift)) + SMALLEST
        close[y[first - second <= slack]] = True


def _two_best(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Highest score, second score and the place of the highest along axis 1."""
    first, winner = scores[:, 0], torch.zeros_like(scores[:, 0], dtype=torch.int64)
    second = torch.full_like(first, -torch.inf)
    for number in range(1, scores.shape[1]):
        score = scores[:, number]
        second = torch.maximum(second, torch.minimum(first, score))
        winner.masked_fill_(score > first, number)
        first = torch.maximum(first, score)
    return first, second, winner


def _scores(strip: Strip, chosen: Chosen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores (n, C, R, S) and a bound (n,) on their error.

    Of blocks it is by the queries that are left out, of single pixels by the blending and the mixing that the dense
    readout rounds.
    """
    shape = (strip.rows.longest, strip.columns.longest) if chosen.pixel is None else (1, 1)
    total = torch.zeros(*chosen.classes.shape, *shape, dtype=dtype)
    error = torch.zeros(len(total), dtype=dtype)
    for source in strip.sources:
        inside = (chosen.row >= source.rows.start) & (chosen.row < source.rows.stop)
        inside &= (chosen.column >= source.columns.start) & (chosen.column < source.columns.stop)
        use = slice(None) if bool(inside.all()) else inside.nonzero()[:, 0]
        pixel = None if chosen.pixel is None else (chosen.pixel[0][use], chosen.pixel[1][use])
        part = Chosen(chosen.row[use], chosen.column[use], chosen.classes[use], pixel)
        if len(part.row):
            scores, rest = _window_scores(strip, source, part, dtype)
            total[use] += scores
            error[use] = torch.maximum(error[use], rest)
    return total, error


def _window_scores(strip: Strip, source: Source, chosen: Chosen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What one window adds to the scores (n, C, R, S), and how far off its scores may be (n,)."""
    row, column = chosen.row - source.rows.start, chosen.column - source.columns.start
    down, across = chosen.pixel or (None, None)
    blend_down, resize_down = _weights(source.rows, strip.rows, row, down, dtype)
    blend_across, resize_across = _weights(source.columns, strip.columns, column, across, dtype)
    queries, mixture, middle, error = _queries(source, row, column, chosen, dtype)
    cells = source.rows.cells[row][:, :, None] * source.masks.shape[2] + source.columns.cells[column][:, None]
    places = queries[:, :, None, None] * source.masks[0].numel() + cells[:, None]
    corners = source.masks.reshape(-1)[places].to(dtype)  # (n, A, F, F)
    lines = (corners.flatten(1, 2) @ blend_across.mT).unflatten(1, corners.shape[1:3])  # (n, A, F, J)
    logits = blend_down[:, None, :, 0, None] * lines[:, :, 0, None]
    for cell in range(1, lines.shape[2]):
        logits = torch.addcmul(logits, blend_down[:, None, :, cell, None], lines[:, :, cell, None])
    scores = logits.sigmoid_()  # (n, A, I, J)
    if chosen.pixel is not None:
        loose = (scores * (1 - scores)).amax((2, 3)) * corners.abs().amax((2, 3))
        error = BLENDING * (loose if mixture is None else (mixture @ loose[:, :, None])[:, :, 0]).amax(1)
        if mixture is not None:
            error += mixing(mixture * scores.amax((2, 3))[:, None]).amax(1)
    if mixture is not None:
        scores = torch.baddbmm(middle, mixture, scores.flatten(2)).unflatten(2, scores.shape[2:])
    if source.offset is not None:
        scores = scores - source.offset.to(dtype)[chosen.classes][:, :, None, None]
    for part, group, resize, axis in (
        (source.rows, row, resize_down, 2), (source.columns, column, resize_across, 3),
    ):  # fmt: skip
        if resize is None:
            scores = scores * part.share.to(dtype)[group][:, None, None, None]
        else:
            scores = resize[:, None] @ scores if axis == 2 else scores @ resize[:, None].mT
    return scores, error


def _weights(
    part: Part, axis: Axis, group: Tensor, pixel: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weights (n, I, F) of cells and (n, R, I) of input pixels; single pixels keep the one or two that they need."""
    if pixel is None:
        return part.blend[group].to(dtype), None if part.resize is None else part.resize[group].to(dtype)
    taps = axis.taps[group + part.start, pixel]  # (n, 2)
    if part.resize is None:
        return part.blend[group[:, None], taps[:, :1]].to(dtype), None
    weights = part.resize[group, pixel].gather(1, taps)
    weights[:, 1] *= taps[:, 1] != taps[:, 0]  # at the border both are the same pixel, which counts once
    return part.blend[group[:, None], taps].to(dtype), weights[:, None].to(dtype)


def _queries(
    source: Source, row: Tensor, column: Tensor, chosen: Chosen, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The queries (n, A) to compute, their weights (n, C, A), the others' scores (n, C, 1) and their error (n,)."""
    none = torch.zeros(len(row), 1, 1, dtype=dtype)
    if source.weights is None:
        return chosen.classes, None, none, none[:, 0, 0]
    mixture = source.weights[chosen.classes].to(dtype)  # (n, C, Q)
    if chosen.pixel is not None:
        return torch.arange(mixture.shape[2]).expand(len(row), -1), mixture, none, none[:, 0, 0]
    low, high = source.low[:, row, column].mT, source.high[:, row, column].mT  # (n, Q)
    influence = mixture * ((high - low) / 2)[:, None]
    strength = influence.amax(1)
    best = (mixture @ high[:, :, None]).amax(1)
    number = max(1, int((strength > NEGLIGIBLE * best).sum(1).max()))
    queries = strength.topk(number, 1, sorted=False).indices
    rest = torch.ones_like(strength).scatter_(1, queries, 0.0)
    middle = mixture @ ((high + low) / 2 * rest)[:, :, None]
    error = (influence * rest[:, None]).sum(2).amax(1)
    return queries, mixture.gather(2, queries[:, None].expand(-1, mixture.shape[1], -1)), middle, error
