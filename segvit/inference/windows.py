"""Class scores of one view of an image, band by band: sliding windows, averaged, resized to the original size.

A (K, H, W) tensor at full resolution never exists. Each row of windows is run when a band first needs it and forgotten
when the bands have passed it, so memory grows neither with classes x height x width nor with the number of windows.

Shapes    K classes, H W the network's input, R rows of a band.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from segvit.contracts import Dense, Runtime, Size
from segvit.nn.readout import bilinear_rows, source_rows


class Input(Protocol):
    """A prepared image (C, H, W), or what gives parts of one: a tensor will do."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, window: Any) -> Tensor: ...


class Box(NamedTuple):
    """A window: rows top..bottom and columns left..right, ends exclusive."""

    top: int
    bottom: int
    left: int
    right: int


def place_windows(size: Size, window: Size, stride: Size) -> list[list[Box]]:
    """mmseg's windows, row by row: steps of `stride`, the last ones pulled back inside.

    A window is smaller than asked for only where the image is.
    """
    tops, lefts = (_starts(*pair) for pair in zip(size, window, stride, strict=True))
    height, width = min(window[0], size[0]), min(window[1], size[1])
    return [[Box(top, top + height, left, left + width) for left in lefts] for top in tops]


def _starts(side: int, window: int, stride: int) -> list[int]:
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, side) - window, 0) for i in range(count)]


class WindowedScores:
    """Class scores of a prepared image (3, H, W); bands must be asked for from top to bottom."""

    def __init__(self, run: Runtime, image: Input, *, at_once: int = 1) -> None:
        self.run, self.image, self.at_once = run, image, at_once
        self.size: Size = (image.shape[-2], image.shape[-1])
        window, stride = run.spec.window or self.size, run.spec.stride or self.size
        self.boxes = place_windows(self.size, window, stride)
        self.outputs: dict[int, list[Dense]] = {}  # row of windows -> what the readout needs of each

    def rows(self, rows: range) -> Tensor:
        """Raw scores (K, R, W) of a band at the input's size, averaged where windows overlap."""
        if len(self.boxes) == len(self.boxes[0]) == 1:
            return self.run.readout(self.row_outputs(0)[0], self.size, rows)[0]
        total: Tensor | None = None
        count = torch.zeros(len(rows), self.size[1])
        for number, boxes in enumerate(self.boxes):
            top, bottom = boxes[0].top, boxes[0].bottom
            if bottom <= rows.start:
                self.outputs.pop(number, None)
            part = range(max(rows.start, top), min(rows.stop, bottom))
            if not len(part):
                continue
            inside = slice(part.start - rows.start, part.stop - rows.start)
            for box, out in zip(boxes, self.row_outputs(number), strict=True):
                size = (bottom - top, box.right - box.left)
                scores = self.run.readout(out, size, range(part.start - top, part.stop - top))[0]
                if total is None:
                    total = scores.new_zeros(scores.shape[0], len(rows), self.size[1])
                total[:, inside, box.left : box.right] += scores
                count[inside, box.left : box.right] += 1
        assert total is not None  # windows cover every row
        return total.div_(count.to(total))

    def row_outputs(self, number: int) -> list[Dense]:
        """The network's output for each window of a row of windows."""
        if number not in self.outputs:
            boxes, outputs = self.boxes[number], []
            for start in range(0, len(boxes), self.at_once):
                part = boxes[start : start + self.at_once]
                crops = [self.image[:, box.top : box.bottom, box.left : box.right] for box in part]
                outputs += split(self.run.readout.trim(self.run(torch.stack(crops))))
            self.outputs[number] = outputs
        return self.outputs[number]

    def rows_at(self, size: Size, rows: range) -> Tensor:
        """Raw scores (K, R, W) of a band of the image resized to `size`: the originals' second resize."""
        if size == self.size:
            return self.rows(rows)
        above, _ = source_rows(self.size[0], size[0], range(rows.start, rows.stop))
        needed = range(int(above[0]), min(int(above[-1]) + 2, self.size[0])) if size[0] != self.size[0] else rows
        band = self.rows(needed)[None]
        return bilinear_rows(band, size, rows, height=self.size[0], first=needed.start)[0]


def split(out: Dense) -> list[Dense]:
    """A batched output as outputs of one image each."""
    count = len(out.logits)
    extras = [{name: value[i : i + 1] for name, value in out.extras.items()} for i in range(count)]
    return [Dense(out.logits[i : i + 1], extras[i], out.covers) for i in range(count)]
