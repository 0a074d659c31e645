"""Error bounds of float32 sums: never passed, whatever the order and magnitudes, and not far above what happens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segvit.inference.rounding import UNIT, mixing


def summed(values, order):
    """float32 sum of values, merged pair by pair in an order that a generator draws."""
    parts = list(values)
    while len(parts) > 1:
        a, b = parts.pop(order.integers(len(parts))), parts.pop(order.integers(len(parts)))
        parts.append(np.float32(a) + np.float32(b))
    return parts[0]


@given(st.integers(0, 10_000), st.integers(1, 200), st.floats(-12, 0))
@settings(max_examples=200, deadline=None)
def test_sums_of_products_stay_within_the_bound(seed, count, decades):
    """Terms of up to twelve decades; merging at random, from the left, and as the library's matrix product does it."""
    rng = np.random.default_rng(seed)
    weights, masks = (10 ** rng.uniform(decades / 2, 0, count).astype(np.float32) for _ in range(2))
    exact = weights.astype(np.float64) * masks.astype(np.float64)
    bound = float(mixing(torch.from_numpy(exact)))
    products = weights * masks
    found = [summed(products, rng), np.add.accumulate(products)[-1],
             float(torch.from_numpy(weights)[None] @ torch.from_numpy(masks)[:, None])]  # fmt: skip
    assert max(abs(float(one) - exact.sum()) for one in found) <= bound


def test_small_terms_count_as_themselves():
    """One large term and many below its rounding: far less than a unit for each of them."""
    terms = torch.full((150,), 1e-11, dtype=torch.float64)
    terms[0] = 0.9
    assert mixing(terms) < 3 * UNIT
    assert mixing(torch.full((150,), 0.006, dtype=torch.float64)) > 75 * UNIT * 0.9
