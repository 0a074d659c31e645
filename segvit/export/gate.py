"""The accuracy gate: an exported file is used only when it says what the model says, in PyTorch and in fp32.

Compared are the outputs and the labels at several sizes and in a batch, and, given data, labels and mIoU over
validation images at their original size.

Shapes    B images, K classes, H W the network's input, R rows of a band.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segvit.contracts import Dense, InputSpec, Runtime, Size, UserError
from segvit.data.dataset import Dataset
from segvit.data.loading import samples
from segvit.data.prepare import normalise
from segvit.data.resize import resize_image
from segvit.data.synthetic import draw_shapes
from segvit.engine.evaluate import check_classes
from segvit.export.record import Precision
from segvit.inference.predictor import BAND, Predictor
from segvit.metrics.confusion import ConfusionMatrix


class Bounds(NamedTuple):
    """What an exported file may differ by."""

    agreement: float  # least share of pixels with the same label
    gap: float | None  # the two best scores of a pixel whose label differs may be that far apart
    miou: float  # points


# In lower precision the labels of a few pixels may change by rights, so there the mIoU decides where data are given.
BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(0.99999, 1e-4, 0.1),
    "bf16": Bounds(0.99, None, 0.1),
    "int8": Bounds(0.95, None, 0.5),
}


class Compared(NamedTuple):
    """One batch through both."""

    batch: int
    size: Size
    error: float  # largest difference of any output
    pixels: int
    differing: int  # pixels with another label
    gap: float  # the widest distance of the two best scores (fp32) at such a pixel


@dataclass
class Gate:
    """What the gate found."""

    precision: Precision
    compared: list[Compared] = field(default_factory=list)
    images: int = 0  # of the validation split
    pixels: int = 0  # of these images
    differing: int = 0
    gap: float = 0.0  # as of Compared, over these images; measured in fp32 only
    miou: tuple[float, float] | None = None  # of the model, of the exported file; in 0..1

    @property
    def all_pixels(self) -> int:
        """Pixels compared, of drawn and of validation images."""
        return self.pixels + sum(one.pixels for one in self.compared)

    @property
    def agreement(self) -> float:
        """The share of all compared pixels that have the same label."""
        return 1 - self.all_differing / self.all_pixels

    @property
    def all_differing(self) -> int:
        """Those of them with another label."""
        return self.differing + sum(one.differing for one in self.compared)

    @property
    def change(self) -> float | None:
        """mIoU points that the exported file gains."""
        return None if self.miou is None else 100 * (self.miou[1] - self.miou[0])

    @property
    def failures(self) -> list[str]:
        """What is above its bound; none when the file may be used."""
        bounds, found = BOUNDS[self.precision], []
        if not all(math.isfinite(one.error) for one in self.compared):
            found.append("outputs are not finite or cover another area")
        judged = self.precision == "fp32" or self.change is None
        # Of few pixels a single tie would be more than the bound allows; how close a tie it is has a bound of its own.
        if judged and self.agreement < bounds.agreement and self.all_differing > 1:
            found.append(f"{self.agreement:.4%} of labels agree, {bounds.agreement:.3%} must")
        widest = max(self.gap, *(one.gap for one in self.compared))
        if bounds.gap is not None and widest > bounds.gap:
            found.append(f"a label differs where the two best scores are {widest:.2g} apart, allowed {bounds.gap:g}")
        if self.change is not None and not abs(self.change) <= bounds.miou:
            found.append(f"mIoU changes by {self.change:+.2f} points, allowed {bounds.miou:g}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The report for machines."""
        return {
            "precision": self.precision, "passed": not self.failures, "failures": self.failures,
            "bounds": BOUNDS[self.precision]._asdict(), "label_agreement": self.agreement,
            "compared": [one._asdict() | {"error": _finite(one.error)} for one in self.compared],
            "validation_images": self.images, "validation_gap": self.gap, "miou": self.miou, "miou_change": self.change,
        }  # fmt: skip

    def to_text(self) -> str:
        """The report for people, in Markdown."""
        lines = [
            "| images | size | largest error | labels that differ | widest gap of these |",
            "|---|---|---|---|---|",
        ]
        for one in self.compared:
            height, width = one.size
            gap = f"{one.gap:.1e}" if one.differing else "-"
            lines.append(
                f"| {one.batch} | {height} x {width} | {one.error:.1e} | {one.differing} of {one.pixels} | {gap} |"
            )
        lines += ["", f"Labels that agree: {self.agreement:.4%}; {self.all_differing} of {self.all_pixels} differ."]
        if self.miou is None or self.change is None:
            lines.append("mIoU: not measured, no data were given.")
        else:
            before, after = self.miou
            lines.append(
                f"mIoU over {self.images} validation images: {before:.4f} in fp32 PyTorch, {after:.4f} exported "
                f"({self.change:+.2f} points)."
            )
        verdict = "passed" if not self.failures else f"FAILED: {'; '.join(self.failures)}"
        return "\n".join([*lines, "", f"Gate for {self.precision}: {verdict}."])


def compare(
    reference: Runtime, exported: Runtime, *, precision: Precision, sizes: Sequence[Size],
    dataset: Dataset | None = None, split: str = "val", count: int = 32,
) -> Gate:  # fmt: skip
    """Run both at every size, the first one also as a batch of two, and over up to `count` images of a split.

    Raises ValueError for fewer than three sizes.
    """
    if len(set(sizes)) < 3:
        raise ValueError(f"the gate needs three sizes or more, got {sorted(set(sizes))}")
    gate = Gate(precision)
    total = count if dataset is None else min(count, dataset.count(split))
    for number, (batch, size) in enumerate([(2, sizes[0]), *((1, size) for size in sizes)]):
        images = torch.stack([drawn_image(reference.spec, size, seed=10 * number + i) for i in range(batch)])
        gate.compared.append(compare_batch(reference, exported, images))
    if dataset is not None:
        compare_split(gate, reference, exported, dataset, split, total)
    return gate


def drawn_image(spec: InputSpec, size: Size, *, seed: int) -> Tensor:
    """A generated scene as the network's input (C, H, W)."""
    scene, _ = draw_shapes(max(64, *size), (seed, 0, 0))
    planes = scene[..., [channel % 3 for channel in range(spec.channels)]]
    return normalise(resize_image(np.ascontiguousarray(planes), size), spec)


def compare_batch(reference: Runtime, exported: Runtime, images: Tensor) -> Compared:
    """The outputs and labels of one batch."""
    size: Size = (images.shape[-2], images.shape[-1])
    ours, theirs = reference.readout.trim(reference(images)), exported(images)
    direct = exported.readout.keeps == tuple(ours.extras) and theirs.logits.shape == ours.logits.shape
    error = _largest_error(ours, theirs) if direct else 0.0
    pixels, differing, gap = 0, 0, 0.0
    for rows in bands(size, len(images) * len(reference.classes)):
        wanted, got = reference.readout(ours, size, rows), exported.readout(theirs, size, rows)
        if not direct:
            error = max(error, _difference(wanted, got))
        other = wanted.argmax(1) != got.argmax(1)
        pixels, differing = pixels + other.numel(), differing + int(other.sum())
        if other.any() and wanted.shape[1] > 1:
            best = wanted.topk(2, dim=1).values  # (B, 2, R, W)
            gap = max(gap, float((best[:, 0] - best[:, 1])[other].max()))
    return Compared(len(images), size, error, pixels, differing, gap)


def _largest_error(ours: Dense, theirs: Dense) -> float:
    if ours.covers != theirs.covers:
        return math.inf
    pairs = [(ours.logits, theirs.logits), *((value, theirs.extras[name]) for name, value in ours.extras.items())]
    return max(_difference(a, b) for a, b in pairs)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where a value is no number."""
    value = float((ours - theirs).abs().max())
    return value if math.isfinite(value) else math.inf


def bands(size: Size, channels: int) -> Iterator[range]:
    """Ranges of rows whose scores are held at once."""
    step = max(1, BAND // (channels * size[1]))
    for start in range(0, size[0], step):
        yield range(start, min(start + step, size[0]))


def compare_split(gate: Gate, reference: Runtime, exported: Runtime, dataset: Dataset, split: str, count: int) -> None:
    """Labels and mIoU over the first `count` images of a split, spread evenly."""
    classes = reference.classes
    check_classes(classes, dataset.classes)
    if count < 1:
        raise UserError(f"the {split} split holds no images; the gate compares on it")
    indices = sorted({i * dataset.count(split) // count for i in range(count)})
    found = [ConfusionMatrix(len(classes), classes.ignore_index) for _ in range(2)]
    predictors = [Predictor(reference), Predictor(exported)]
    for sample in samples(dataset, split, indices=indices):
        labels = [predictor.segment(sample.image)[0] for predictor in predictors]
        for matrix, guess in zip(found, labels, strict=True):
            matrix.update(guess, sample.mask)
        other = labels[0] != labels[1]
        gate.pixels, gate.differing = gate.pixels + other.size, gate.differing + int(other.sum())
        if BOUNDS[gate.precision].gap is not None and other.any():
            best = predictors[0].top(sample.image, 2)[1][:, other]
            gate.gap = max(gate.gap, float((best[0] - best[1]).max()))
    gate.images = len(indices)
    gate.miou = (float(found[0].metrics().miou), float(found[1].metrics().miou))


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
