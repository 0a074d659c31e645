"""What all metrics take: predicted and labelled class ids of one shape, checked, with the ignored pixels told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch costs seconds to import and only its arrays' type is needed
    from torch import Tensor

BLOCK = 1 << 20  # pixels counted at once: large images never need memory for more


class Labelled(NamedTuple):
    """Class ids of predictions and labels, 0 where the label is ignored."""

    pred: NDArray[Any]
    label: NDArray[Any]
    valid: NDArray[np.bool_]  # False where the label is ignored


def same_shape(pred: NDArray[Any] | Tensor, label: NDArray[Any] | Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as arrays; ValueError unless they hold integers and have one shape."""
    guess, truth = _integers(pred, "pred"), _integers(label, "label")
    if guess.shape != truth.shape:
        raise ValueError(f"pred is {guess.shape} but label is {truth.shape}; resize the prediction to the label")
    return guess, truth


def labelled(pred: NDArray[Any], label: NDArray[Any], num_classes: int, ignore_index: int) -> Labelled:
    """Take the ignored pixels out; ValueError for ids that are no class, but not for predictions at ignored pixels."""
    valid = label != ignore_index
    label, pred = label * valid, pred * valid  # three times faster than selecting the others
    _check(label, num_classes, "label", f" or the ignore id {ignore_index}")
    _check(pred, num_classes, "prediction", "")
    return Labelled(pred, label, valid)


def _integers(ids: NDArray[Any] | Tensor, what: str) -> NDArray[Any]:
    array: NDArray[Any] = ids if isinstance(ids, np.ndarray) else ids.detach().cpu().numpy()
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} holds {array.dtype}; class ids must be integers")
    return array


def _check(ids: NDArray[Any], num_classes: int, what: str, allowed: str) -> None:
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{what} {wrong} is not a class id; allowed are 0 to {num_classes - 1}{allowed}")
