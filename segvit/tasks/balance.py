"""Class imbalance in a run: the weights of the loss and what steers rare crops, from the pixels of the train split.

Both follow from the data alone, so a resumed run finds the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.data.balance import class_weights, count_pixels
from segvit.data.dataset import Dataset, holds_volumes, is_generated
from segvit.data.doctor.balance import class_table
from segvit.data.doctor.survey import survey
from segvit.tasks.experiment import Experiment


class ClassBalance(NamedTuple):
    """What a run does about rare classes."""

    weights: NDArray[np.float32] | None  # (K,) of the loss; None = the system's own loss
    rarity: NDArray[np.float32] | None  # (K,) how much rare crops seek each class; None = there are no rare crops

    def message(self, names: tuple[str, ...]) -> str:
        """The range of the weights in words."""
        assert self.weights is not None
        pairs = sorted(zip(self.weights.tolist(), names, strict=True))
        (low, common), (high, rare) = pairs[0], pairs[-1]
        return f"class weights from {low:.3g} ({common}) to {high:.3g} ({rare})"


def train_pixels(source: str, dataset: Dataset) -> NDArray[np.int64]:
    """Labelled pixels of each class in the train split (K,): the doctor's table, which remembers unchanged masks."""
    if is_generated(source) or holds_volumes(source):
        return count_pixels(dataset, "train")
    rows = [row for row in class_table(survey(source, hashes=False)) if row.split == "train"]
    return np.array([row.pixels for row in rows[: len(dataset.classes)]], np.int64)


def class_balance(experiment: Experiment, dataset: Dataset) -> ClassBalance:
    """The balance that the experiment asks for; the masks are only read if it asks for any."""
    weighed, rare = experiment.class_balance != "none", experiment.augment.rare_crops > 0
    if not weighed and not rare:
        return ClassBalance(None, None)
    pixels = train_pixels(experiment.data, dataset)
    weights = class_weights(pixels, experiment.class_balance) if weighed else None
    return ClassBalance(weights, class_weights(pixels, "sqrt") if rare else None)
