"""The gate on runtimes that differ from the model by a known amount."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from segvit.contracts import Classes, Dense, InputSpec, Readout
from segvit.data.synthetic import CLASSES
from segvit.export.gate import Compared, Gate, compare
from segvit.nn.readout import logit_rows
from tests.export.conftest import SIZES


class Fake:
    """A runtime whose logits are a fixed function of the image, changed by `change`."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda logits: logits, classes: Classes = CLASSES) -> None:
        self.spec, self.classes, self.readout, self.change = InputSpec(), classes, Readout(logit_rows), change

    def __call__(self, images: Tensor) -> Dense:
        mix = torch.randn(len(self.classes), 3, generator=torch.Generator().manual_seed(0))
        logits = torch.einsum("kc,bchw->bkhw", mix, images)
        return Dense(self.change(logits), {}, (images.shape[-2], images.shape[-1]))


def spoil(logits: Tensor) -> Tensor:
    """Another class wins in one pixel of every image."""
    logits = logits.clone()
    logits[:, :, 0, 0] = -logits[:, :, 0, 0]
    return logits


def test_the_same_passes() -> None:
    gate = compare(Fake(), Fake(), precision="fp32", sizes=SIZES)
    assert gate.failures == []
    assert [(one.batch, one.size) for one in gate.compared] == [(2, SIZES[0]), *((1, size) for size in SIZES)]
    assert gate.agreement == 1
    assert gate.change is None
    assert "passed" in gate.to_text()
    assert gate.to_json()["passed"]


def test_the_error_is_that_of_the_logits() -> None:
    gate = compare(Fake(), Fake(lambda logits: logits + 0.25), precision="fp32", sizes=SIZES)
    assert all(abs(one.error - 0.25) < 1e-5 for one in gate.compared)
    assert gate.all_differing == 0


def test_pixels_with_another_label_are_counted_with_the_gap_of_their_scores() -> None:
    gate = compare(Fake(), Fake(spoil), precision="fp32", sizes=SIZES)
    assert [one.differing for one in gate.compared] == [2, 1, 1, 1]
    assert max(one.gap for one in gate.compared) > 0.01
    assert len(gate.failures) == 2  # too many, and no ties
    assert "apart" in gate.failures[1]


def test_ties_of_fp32_may_fall_either_way() -> None:
    tie = Compared(1, (400, 600), 1e-6, 240_000, 2, 5e-5)
    assert Gate("fp32", [tie]).failures == []
    assert Gate("fp32", [tie._replace(gap=2e-4)]).failures != []
    assert Gate("fp32", [tie._replace(differing=3)]).failures != []
    assert Gate("fp32", [tie._replace(pixels=100, differing=1)]).failures == []  # a single tie of a small picture
    assert Gate("int8", [tie._replace(gap=0.1)]).failures == []


def test_values_that_are_no_numbers_fail_in_every_precision() -> None:
    gate = compare(Fake(), Fake(lambda logits: logits / 0), precision="int8", sizes=SIZES)
    assert "not finite" in gate.failures[0]
    assert gate.to_json()["compared"][0]["error"] is None  # JSON has no infinity


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 0.1), ("bf16", 0.1), ("int8", 0.5)])
def test_the_bound_on_the_miou(precision: str, allowed: float) -> None:
    same = [Compared(1, (9, 9), 0.0, 81, 0, 0.0)]
    for points, passes in ((allowed - 0.01, True), (allowed + 0.01, False), (math.nan, False)):
        gate = Gate(precision, same, images=1, pixels=1, miou=(0.5, 0.5 - points / 100))
        assert (gate.failures == []) == passes, (points, gate.failures)


def test_validation_images_are_compared_at_their_own_size() -> None:
    from segvit.data.dataset import open_dataset

    dataset = open_dataset("synthetic:shapes")
    gate = compare(Fake(), Fake(spoil), precision="int8", sizes=SIZES, dataset=dataset, count=3)
    assert gate.images == 3
    assert gate.differing == 3  # one pixel an image
    assert gate.pixels == 3 * dataset.read("val", 0).mask.size
    assert gate.miou is not None
    assert gate.miou[0] != gate.miou[1]
    assert "3 validation images" in gate.to_text()
    exact = compare(Fake(), Fake(spoil), precision="fp32", sizes=SIZES, dataset=dataset, count=3)
    exact.compared = [one._replace(gap=0.0) for one in exact.compared]  # leaves the gap of the validation images
    assert exact.gap > 0.01
    assert any("apart" in failure for failure in exact.failures)


def test_three_sizes_are_the_least() -> None:
    with pytest.raises(ValueError, match="three sizes"):
        compare(Fake(), Fake(), precision="fp32", sizes=SIZES[:2] * 2)
