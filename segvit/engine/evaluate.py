"""Evaluation: label maps at the original resolution into one streaming confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from segvit.contracts import UserError
from segvit.data.dataset import Dataset
from segvit.data.loading import samples
from segvit.inference.predictor import Predictor
from segvit.metrics.confusion import ConfusionMatrix


@dataclass
class Evaluation:
    """What an evaluation found."""

    confusion: ConfusionMatrix
    image_miou: dict[int, float] = field(default_factory=dict)  # by index in the split; NaN where all is ignored


def evaluate(
    predictor: Predictor, dataset: Dataset, split: str, *, indices: Sequence[int] | None = None, workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:  # fmt: skip
    """Evaluate a split, or the images `indices` of it. Raises UserError for an empty split or another class count."""
    classes = dataset.classes
    if len(predictor.run.classes) != len(classes):
        raise UserError(
            f"the model has {len(predictor.run.classes)} classes and the data {len(classes)}; evaluate on data with "
            "the model's class table, or train with --init to change the classes"
        )
    names = predictor.run.classes.names
    if names != classes.names and not names[0].startswith("class_"):  # converted checkpoints may have no names
        first = next(i for i in range(len(names)) if names[i] != classes.names[i])
        raise UserError(
            f"class {first} is {names[first]!r} in the model and {classes.names[first]!r} in the data; evaluate on "
            "data with the model's class table, or train with --init to change the classes"
        )
    order = range(dataset.count(split)) if indices is None else indices
    if not dataset.count(split):
        raise UserError(f"the {split} split holds no images; name another with --split or add some")
    result = Evaluation(ConfusionMatrix(len(classes), classes.ignore_index))
    for done, (index, sample) in enumerate(
        zip(order, samples(dataset, split, indices=order, workers=workers), strict=True)
    ):
        single = ConfusionMatrix(len(classes), classes.ignore_index)
        single.update(predictor.segment(sample.image)[0], sample.mask)
        result.confusion.add(single)
        result.image_miou[index] = float(single.metrics().miou)
        progress(done + 1, len(order))
    return result


def worst_images(evaluation: Evaluation, count: int) -> list[int]:
    """The images of the lowest mIoU, worst first; images with nothing but ignore are left out."""
    known = [index for index, miou in evaluation.image_miou.items() if not np.isnan(miou)]
    return sorted(known, key=lambda index: (evaluation.image_miou[index], index))[:count]
