"""Ratios of counts in which "not defined" is NaN: 0 / 0 without a warning, means over what is defined, None in JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]


def ratio(part: Any, whole: Any) -> Ratios:
    """part / whole, NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.true_divide(part, whole), np.float64)


def mean(values: Ratios) -> float:
    """The mean of the finite values; NaN if there is none, where numpy's nanmean would warn."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def defined(values: Ratios) -> int:
    """How many values are finite."""
    return int(np.isfinite(values).sum())


def number(value: float) -> float | None:
    """A value as JSON can hold it: None for NaN."""
    return None if math.isnan(value) else float(value)
