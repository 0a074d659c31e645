"""Evaluation: label maps at the original resolution into streaming integer counts, and the regions worth a second look.

Nothing of an image is kept but its counts: memory does not grow with the data.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segvit.contracts import Classes, Sample, UserError
from segvit.data.dataset import Dataset
from segvit.data.loading import samples
from segvit.inference.predictor import Predictor
from segvit.metrics.confusion import ConfusionMatrix

if TYPE_CHECKING:
    from segvit.metrics.boundary import BoundaryCounts
    from segvit.metrics.calibration import CalibrationCounts
    from segvit.metrics.polyp import PolypMeasures

SURE = 0.9  # confidence from which a disagreement with the label is suspicious
LEAST_SHARE = 1e-3  # of the image that a suspicious region must fill
MAX_SUSPECTS = 12

Watch = Callable[[int, Sample, NDArray[Any]], None]  # gets an image's number, the image, and the labels found (H, W)

CONFIDENCE = {
    "softmax": "the softmax of the winning class",
    "share": "the winning class's share of all scores, which are sums of probabilities",
    "score": "the winning class's score, a probability of its own",
}


class Suspect(NamedTuple):
    """A region where a confident prediction contradicts the label: either may be wrong."""

    image: int  # its number in the split
    box: tuple[int, int, int, int]  # top, bottom, left, right, ends exclusive
    label: int  # the commonest class of the region in the label
    prediction: int
    pixels: int
    confidence: float  # mean over the region

    @property
    def weight(self) -> float:
        """What suspects are ranked by."""
        return self.pixels * self.confidence


@dataclass
class Evaluation:
    """What an evaluation found."""

    confusion: ConfusionMatrix
    image_miou: dict[int, float] = field(default_factory=dict)  # by index in the split; NaN where all is ignored
    boundary: BoundaryCounts | None = None  # these three only with `details`
    calibration: CalibrationCounts | None = None
    suspects: list[Suspect] = field(default_factory=list)  # the heaviest first
    confidence: str = ""  # what confidence means here
    polyp: PolypMeasures | None = None  # only where asked for
    volumes: dict[str, Any] | None = None  # what whoever watched made of whole volumes


def evaluate(
    predictor: Predictor, dataset: Dataset, split: str, *, indices: Sequence[int] | None = None, workers: int = 0,
    details: bool = False, polyp: bool = False, watch: Watch | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:  # fmt: skip
    """Evaluate a split, or the images `indices` of it; `details` adds boundaries, calibration and suspicious labels.

    `polyp` adds the measures of `segvit.metrics.polyp` for the second of two classes; `watch` is told of every image.
    Raises UserError for an empty split, another class table, or `polyp` with more classes.
    """
    classes = dataset.classes
    if polyp and len(classes) != 2:
        raise UserError(f"polyp measures are for a background and one class; the data have {len(classes)} classes")
    check_classes(predictor.run.classes, classes)
    order = range(dataset.count(split)) if indices is None else indices
    if not dataset.count(split):
        raise UserError(f"the {split} split holds no images; name another with --split or add some")
    result = Evaluation(ConfusionMatrix(len(classes), classes.ignore_index))
    if details:
        from segvit.metrics.boundary import BoundaryCounts
        from segvit.metrics.calibration import CalibrationCounts

        result.boundary = BoundaryCounts(len(classes), classes.ignore_index)
        # The mean of views' softmaxes is flat where the scores are no logits: sums of probabilities have no softmax.
        if predictor.views.count == 1 or predictor.run.readout.confidence == "softmax":
            result.calibration = CalibrationCounts(classes.ignore_index)
            result.confidence = CONFIDENCE[predictor.run.readout.confidence]
    if polyp:
        from segvit.metrics.polyp import PolypMeasures

        result.polyp = PolypMeasures()
    for done, (index, sample) in enumerate(
        zip(order, samples(dataset, split, indices=order, workers=workers), strict=True)
    ):
        single = ConfusionMatrix(len(classes), classes.ignore_index)
        if details or polyp:
            labels, sure = predictor.read(sample.image)
            _look_closer(result, index, sample, labels, sure)
        else:
            labels = predictor.segment(sample.image)[0]
        if watch is not None:
            watch(index, sample, labels)
        single.update(labels, sample.mask)
        result.confusion.add(single)
        result.image_miou[index] = float(single.metrics().miou)
        progress(done + 1, len(order))
    result.suspects.sort(key=lambda suspect: (-suspect.weight, suspect.image))
    return result


def check_classes(known: Classes, wanted: Classes) -> None:
    """Raise UserError unless a model's classes are those of the data."""
    if len(known) != len(wanted):
        raise UserError(
            f"the model has {len(known)} classes and the data {len(wanted)}; evaluate on data with the model's class "
            "table, train with --init to change the classes, or give a model that knows words --classes data"
        )
    names = known.names
    if names != wanted.names and not names[0].startswith("class_"):  # converted checkpoints may have no names
        first = next(i for i in range(len(names)) if names[i] != wanted.names[i])
        raise UserError(
            f"class {first} is {names[first]!r} in the model and {wanted.names[first]!r} in the data; evaluate on "
            "data with the model's class table, train with --init to change the classes, or give a model that knows "
            "words --classes data"
        )


def _look_closer(
    result: Evaluation, index: int, sample: Sample, labels: NDArray[Any], sure: NDArray[np.float32]
) -> None:
    """Boundaries, calibration and the suspicious region of one image."""
    if result.boundary is not None:
        result.boundary.update(labels, sample.mask)
    if result.polyp is not None:
        result.polyp.update_from_labels(labels, sure, sample.mask)
    if result.calibration is None:
        return
    result.calibration.update(sure, labels, sample.mask)
    suspect = suspicious(index, sample.mask, labels, sure, result.confusion.ignore_index)
    if suspect is not None:
        result.suspects.append(suspect)
        result.suspects = heapq.nlargest(MAX_SUSPECTS, result.suspects, key=lambda one: (one.weight, -one.image))


def suspicious(
    index: int, mask: NDArray[Any], labels: NDArray[Any], sure: NDArray[np.float32], ignore: int
) -> Suspect | None:
    """The largest region of an image where a prediction of confidence 0.9 or more contradicts the label.

    Lines thinner than three pixels are left out: outlines are drawn differently by every annotator.
    """
    against = ndimage.binary_opening((labels != mask) & (mask != ignore) & (sure >= SURE), np.ones((3, 3), bool))
    regions, count = ndimage.label(against)
    if not count:
        return None
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    largest = int(sizes.argmax())
    if sizes[largest] < LEAST_SHARE * mask.size:
        return None
    inside = regions == largest
    rows, columns = ndimage.find_objects(inside.astype(np.int8))[0]
    return Suspect(
        index, (rows.start, rows.stop, columns.start, columns.stop), int(np.bincount(mask[inside]).argmax()),
        int(np.bincount(labels[inside]).argmax()), int(sizes[largest]), float(sure[inside].mean()),
    )  # fmt: skip


def ranked_images(evaluation: Evaluation) -> list[int]:
    """The images from the lowest mIoU to the highest; images with nothing but ignore are left out."""
    known = [index for index, miou in evaluation.image_miou.items() if not np.isnan(miou)]
    return sorted(known, key=lambda index: (evaluation.image_miou[index], index))


def evaluation_record(evaluation: Evaluation, classes: Classes) -> dict[str, Any]:
    """All figures and the raw confusion matrix, ready for JSON; undefined values are None."""
    record = evaluation.confusion.metrics().to_json(classes)
    if evaluation.boundary is not None:
        edges = evaluation.boundary.metrics()
        record["boundary"] = edges.to_json()
        for row, iou, f in zip(record["classes"], edges.iou, edges.f, strict=True):
            row["boundary_iou"] = None if np.isnan(iou) else float(iou)
            row["boundary_f"] = None if np.isnan(f) else float(f)
    if evaluation.calibration is not None:
        record["calibration"] = evaluation.calibration.metrics().to_json()
        record["confidence"] = evaluation.confidence
    if evaluation.polyp is not None:
        record["polyp"] = evaluation.polyp.metrics().to_json()
    if evaluation.volumes is not None:
        record["volumes"] = evaluation.volumes
    record["confusion"] = evaluation.confusion.matrix.tolist()
    return record
