"""Speed of the metrics beside a masked numpy bincount, torchmetrics and mmseg's way of counting, on one thread.

    python benchmarks/metrics.py                      # 512 x 512, 150 classes
    python benchmarks/metrics.py --size 1024 --classes 19 --json

All count the same two pairs of label maps: noise, in which every pixel is drawn on its own and 10 % are ignored, and
shapes, which has regions and outlines as real maps have. Every round runs all of them in another order: a machine whose
speed drifts drifts for all, and none always finds the caches filled. Exits with 1 if on one of the pairs ours is not
twice as fast as the bincount and ten times as fast as torchmetrics with its default arguments (it is shown without its
checks, too), or if any of them counts something else.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from segvit.metrics.boundary import BoundaryCounts
from segvit.metrics.calibration import CalibrationCounts
from segvit.metrics.confusion import ConfusionMatrix

IGNORE = 255
AIMS = {"numpy_bincount": 2.0, "torchmetrics": 10.0}  # how much faster ours must be
IDS = NDArray[np.uint8]


def noise(rng: np.random.Generator, side: int, classes: int) -> tuple[IDS, IDS]:
    """Prediction and label (H, W), 60 % of the pixels right."""
    size = (side, side)
    label = rng.integers(0, classes, size).astype(np.uint8)
    pred = np.where(rng.random(size) < 0.6, label, rng.integers(0, classes, size)).astype(np.uint8)
    label[rng.random(size) < 0.1] = IGNORE
    return pred, label


def shapes(rng: np.random.Generator, side: int, classes: int, *, cells: int = 60) -> tuple[IDS, IDS]:
    """Prediction and label (H, W) of convex regions; predicted outlines are a little off, a tenth of the ids wrong."""
    centres, ids = rng.random((cells, 2)) * side, rng.integers(0, classes, cells)
    label = regions(centres, ids, side)
    wrong = rng.random(cells) < 0.1
    moved = centres + rng.normal(scale=side / 128, size=centres.shape)
    pred = regions(moved, np.where(wrong, rng.integers(0, classes, cells), ids), side)
    label[regions(centres, rng.random(cells) < 0.1, side) > 0] = IGNORE
    return pred, label


def regions(centres: NDArray[np.float64], ids: NDArray[np.generic], side: int) -> IDS:
    """Every pixel has the id of its nearest centre."""
    rows, columns = np.mgrid[:side, :side]
    best, nearest = np.full((side, side), np.inf), np.zeros((side, side), np.intp)
    for i, (y, x) in enumerate(centres):
        distance = (rows - y) ** 2 + (columns - x) ** 2
        nearest[distance < best] = i
        np.minimum(best, distance, out=best)
    return ids[nearest].astype(np.uint8)


def masked_bincount(total: NDArray[np.int64], pred: IDS, label: IDS) -> None:
    """The usual numpy lines: select what is not ignored, one code a pair, count."""
    valid = label != IGNORE
    codes = label[valid].astype(np.int64) * len(total) + pred[valid]
    total += np.bincount(codes, minlength=total.size).reshape(total.shape)


def histograms(total: Tensor, pred: Tensor, label: Tensor) -> None:
    """Three floating point histograms of what is not ignored, the way mmseg counts: hits, predictions and labels."""
    valid = label != IGNORE
    pred, label = pred[valid], label[valid]
    for row, ids in zip(total, (pred[pred == label], pred, label), strict=True):
        row += torch.histc(ids.float(), bins=len(row), min=0, max=len(row) - 1)


def measure(pred: IDS, label: IDS, classes: int, rounds: int) -> tuple[dict[str, float], bool]:
    """Median seconds of each way to count one image, and whether all found the same IoU."""
    ours, plain = ConfusionMatrix(classes, IGNORE), np.zeros((classes, classes), np.int64)
    areas, tensors = torch.zeros(3, classes, dtype=torch.float64), (torch.from_numpy(pred), torch.from_numpy(label))
    wide = tuple(ids.long() for ids in tensors)  # what torchmetrics is fastest with; not timed
    checked, unchecked = (
        MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORE, validate_args=check)
        for check in (True, False)
    )
    boundary, calibration = BoundaryCounts(classes, IGNORE), CalibrationCounts(IGNORE)
    sure = np.random.default_rng(1).beta(8, 1, label.shape).astype(np.float32)  # most pixels are quite sure
    seconds = timed(
        {
            "ours": lambda: ours.update(pred, label),
            "numpy_bincount": lambda: masked_bincount(plain, pred, label),
            "torchmetrics": lambda: checked.update(*wide),
            "torchmetrics_unchecked": lambda: unchecked.update(*wide),
            "mmseg": lambda: histograms(areas, *tensors),
            "ours_boundary": lambda: boundary.update(pred, label),
            "ours_calibration": lambda: calibration.update(sure, pred, label),
        },
        rounds,
    )
    iou, union = ours.metrics().iou, areas[1] + areas[2] - areas[0]
    others = [checked.compute(), unchecked.compute(), areas[0] / union]
    # Torchmetrics gives 0 where the IoU of an absent class is not defined.
    same = all(np.allclose(np.nan_to_num(iou), np.nan_to_num(other.numpy()), atol=1e-6) for other in others)
    return seconds, same and bool((ours.matrix == plain).all())


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order, names = random.Random(0), list(ways)
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            ways[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150, help="255 at most")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, report, failed = np.random.default_rng(0), {}, False
    for draw in (noise, shapes):
        seconds, same = measure(*draw(rng, arguments.size, arguments.classes), arguments.classes, arguments.rounds)
        faster = {name: value / seconds["ours"] for name, value in seconds.items() if not name.startswith("ours")}
        missed = [name for name, aim in AIMS.items() if faster[name] < aim]
        report[draw.__name__] = {
            "images_per_s": {name: 1 / value for name, value in seconds.items()}, "ours_is_faster": faster,
            "same_counts": same, "aims_missed": missed,
        }  # fmt: skip
        failed |= bool(missed) or not same
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for name, figures in report.items():
            print(f"{name:24} {'images/s':>9} {'ms/image':>9}  ours is faster")
            for way, rate in figures["images_per_s"].items():
                times, aim = figures["ours_is_faster"].get(way), AIMS.get(way)
                ratio = "" if times is None else f"{times:6.1f} times" + (f"  (aim: {aim:g})" if aim else "")
                print(f"  {way:22} {rate:9.0f} {1000 / rate:9.2f}  {ratio}".rstrip())
            print(f"  same counts: {figures['same_counts']}, aims missed: {figures['aims_missed'] or 'none'}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
