"""How far float32 scores of mixed masks may lie from the real ones: what the pruned readout's decisions rest on."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-24  # rounding of float32: half the distance from 1 to the next number
# Error of an interpolated logit in parts of its largest cell. A blend a (1 - w) + b w rounds w and 1 - w, both products
# and their sum: 3 + w units at most. There are two blends; 9 is for the products of these errors. The logarithm of the
# sigmoid has a slope of 1 - s, so that a mask of s is off by no more than that times 1 - s, in parts of itself.
BLENDING = 9 * UNIT
SMALLEST = 1e-30  # below this, underflow makes float32 differ from real numbers by more than rounding


def rounding(queries: int, windows: int) -> float:
    """How far a float32 score may lie from the real one of the same mask logits, in parts of its masks' sum and offset.

    Bounds in units of 2^-24 for any order of summation, fused or not. The sigmoid's exponential is within 1 unit in the
    last place, which is 2, and a sum and a division follow: 4. A product of `queries` (0 = no mixing) positive terms
    makes that many. The offset makes 1, the average of windows one each and 1, the second resize two blends of 4 each
    (see BLENDING): 20 in all with reserve.
    """
    return UNIT * (queries + windows + 20)


def mixing(terms: Tensor) -> Tensor:
    """How far a float32 sum of terms (..., Q) that are not negative may lie from the real one, products and all: (...).

    Adding b to a errs by no more than half the distance of floats at the sum and by no more than b, in whatever order.
    So terms below that count as themselves, and only the others make a half each. The products make one UNIT more.
    """
    whole = terms.sum(-1, keepdim=True)
    half = torch.exp2(torch.floor(torch.log2(whole * (1 + 1e-4))) - 24)
    return torch.minimum(terms, half).sum(-1) + UNIT * whole[..., 0]
