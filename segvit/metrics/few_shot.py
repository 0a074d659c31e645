"""mIoU of a fold's classes and FB-IoU, from the binary prediction of each episode.

Policy    as PFENet and BAM: pixels whose label is the ignore id are dropped; counts are summed over all episodes of a
          class before the ratio. The mean runs over all classes of the fold, and one without an episode counts 0: see
          `episodes`. FB-IoU is the mean of the IoU of background and of object, over all episodes whatever their class.
Checked   tests/golden/few_shot_segmentation__metrics (dvlab-research/PFENet).

Shapes    H W pixels of one episode; 0 is background, 1 the object.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EPS = 1e-10


@dataclass(frozen=True, kw_only=True)
class FewShotMetrics:
    """Ratios in 0..1; `class_iou` and `episodes` are by class id."""

    miou: float
    fb_iou: float
    background_iou: float
    foreground_iou: float
    class_iou: dict[int, float]
    episodes: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


class EpisodeCounts:
    """Intersections and unions by class; any order of the episodes gives the same."""

    def __init__(self, classes: Iterable[int], *, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index
        self.episodes = dict.fromkeys(classes, 0)
        # For each class intersection and union, of background and of object.
        self.areas = {label: np.zeros((2, 2), np.int64) for label in self.episodes}

    def update(self, label: int, prediction: NDArray[Any], target: NDArray[Any]) -> None:
        """Count one episode about class `label`, both masks (H, W). Raises ValueError for other sizes and classes."""
        if prediction.shape != target.shape or label not in self.areas:
            raise ValueError(
                f"prediction {prediction.shape} of class {label}, target {target.shape}; the sizes must be equal and "
                f"the class one of {list(self.areas)}"
            )
        valid = target != self.ignore_index
        guess, truth = prediction[valid] == 1, target[valid] == 1
        both, neither = int(np.sum(guess & truth)), int(np.sum(~guess & ~truth))
        wrong = len(truth) - both - neither
        self.areas[label] += np.array([[neither, neither + wrong], [both, both + wrong]])
        self.episodes[label] += 1

    def metrics(self) -> FewShotMetrics:
        """All ratios of the counts so far."""
        class_iou = {label: _iou(areas[1]) for label, areas in self.areas.items()}
        background, foreground = (_iou(areas) for areas in sum(self.areas.values(), np.zeros((2, 2), np.int64)))
        return FewShotMetrics(
            miou=float(np.mean(list(class_iou.values()))), fb_iou=(background + foreground) / 2,
            background_iou=background, foreground_iou=foreground, class_iou=class_iou, episodes=dict(self.episodes),
        )  # fmt: skip


def _iou(areas: NDArray[np.int64]) -> float:
    return float(areas[0] / (areas[1] + EPS))
