"""A small runtime for the tests of this folder: one random convolution, logits at a stride, and a log of its calls."""

import math

import torch
import torch.nn.functional as F

from segvit.contracts import Classes, Dense, InputSpec, Readout
from segvit.nn.readout import logit_rows


def numbered(count):
    return Classes(tuple(str(i) for i in range(count)), tuple((i % 256, 0, 0) for i in range(count)))


class FakeRuntime:
    def __init__(self, classes=5, *, cell=4, **spec):
        generator = torch.Generator().manual_seed(classes)
        self.spec, self.classes, self.readout = InputSpec(**spec), numbered(classes), Readout(logit_rows)
        self.cell = cell
        self.weight = torch.randn(classes, self.spec.channels, cell, cell, generator=generator)
        self.calls = []  # shapes of the inputs

    def __call__(self, images):
        self.calls.append(tuple(images.shape))
        height, width = images.shape[-2:]
        covers = tuple(self.cell * math.ceil(side / self.cell) for side in (height, width))
        padded = F.pad(images, (0, covers[1] - width, 0, covers[0] - height))
        return Dense(F.conv2d(padded, self.weight, stride=self.cell), {"unused": images}, covers)

    def whole(self, images):
        """Scores (B, K, H, W) at the size of the input, the plain way."""
        out = self(images)
        full = F.interpolate(out.logits, size=out.covers, mode="bilinear", align_corners=False)
        return full[..., : images.shape[-2], : images.shape[-1]]
