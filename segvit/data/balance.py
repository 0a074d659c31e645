"""Class imbalance: how many pixels each class has, and the weights that make up for it.

Shapes    K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError

if TYPE_CHECKING:  # recipes read the choices below without the readers of images
    from segvit.data.dataset import Dataset

Balance = Literal["none", "log", "sqrt", "effective"]


def count_pixels(dataset: Dataset, split: str, *, limit: int | None = None) -> NDArray[np.int64]:
    """The labelled pixels of each class in a split: (K,). With `limit` of that many images, evenly spread."""
    count, pixels = dataset.count(split), np.zeros(len(dataset.classes), np.int64)
    chosen = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    for i in chosen:
        mask = dataset.read(split, i).mask
        pixels += np.bincount(mask.ravel(), minlength=len(pixels))[: len(pixels)]  # what follows is the ignore id
    return pixels


def class_weights(pixels: NDArray[np.int64], how: Balance) -> NDArray[np.float32]:
    """Weights (K,) of classes with that many pixels (K,), with mean 1 over the pixels; 1 for a class without any.

    With p the class's share of the pixels: `log` is 1 / ln(1.02 + p) (ENet, Paszke et al., 2016), at most 36 times the
    least; `sqrt` is 1 / sqrt(p); `effective` is (1 - b) / (1 - b^n) (Cui et al., 2019) for the n pixels of the class
    and b = exp(-1 / the mean n): about 1 / p for a class rarer than the mean, about equal for the others.

    Raises UserError where no pixel is labelled.
    """
    total, present = pixels.sum(), pixels > 0
    if not total:
        raise UserError("no pixel of the training masks is labelled, so classes have no weights; check the class table")
    share = pixels[present] / total
    weights = np.ones(len(pixels))
    weights[present] = raw_weights(share, how)
    weights[present] /= (share * weights[present]).sum()
    return weights.astype(np.float32)


def raw_weights(share: NDArray[np.float64], how: Balance) -> NDArray[Any]:
    """The weights of classes of those shares up to a common factor."""
    if how == "log":
        return 1 / np.log(1.02 + share)
    if how == "sqrt":
        return 1 / np.sqrt(share)
    if how == "effective":
        return -1 / np.expm1(-share * len(share))  # share times classes is n / the mean n
    if how == "none":
        return np.ones_like(share)
    raise UserError(f"class_balance is {how!r}; choose from {', '.join(get_args(Balance))}")
