"""Numbers of a dataset: pixels and images of each class by split, class weights, the images' mean and deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError
from segvit.data.balance import class_weights
from segvit.data.dataset import Dataset, holds_volumes, is_generated, open_dataset
from segvit.data.doctor.balance import ClassRow, class_table
from segvit.data.doctor.survey import survey
from segvit.tasks.console import aligned, progress_bar


@dataclass(frozen=True)
class Stats:
    """For machines and for people."""

    report: dict[str, Any]
    text: str


def dataset_stats(source: str, *, images: int) -> Stats:
    """Read every mask, and up to `images` training images evenly spread, and count. Raises UserError for bad files."""
    if images < 0:
        raise UserError(f"images must not be negative, got {images}")
    dataset = open_dataset(source)
    counts = (
        {split: count_split(dataset, split) for split in dataset.splits}
        if is_generated(source) or holds_volumes(source)
        else remembered_counts(source, dataset)
    )
    first = "train" if "train" in counts else dataset.splits[0]
    weights = {how: class_weights(counts[first].pixels, how) for how in ("log", "sqrt", "effective")}
    levels = channel_levels(dataset, first, images)
    report = {
        "data": source,
        "splits": {split: count.to_json(dataset) for split, count in counts.items()},
        "class_weights": {how: [round(float(w), 4) for w in values] for how, values in weights.items()},
        "levels": levels,
    }
    return Stats(report, _text(dataset, counts, weights, levels))


@dataclass(frozen=True)
class SplitCount:
    """Labelled pixels and images of each class (K,)."""

    images: int
    pixels: NDArray[np.int64]
    present: NDArray[np.int64]
    ignored: int  # pixels

    def to_json(self, dataset: Dataset) -> dict[str, Any]:
        """One record a class."""
        total = max(int(self.pixels.sum()), 1)
        rows = [
            {"name": name, "pixels": int(self.pixels[i]), "share": int(self.pixels[i]) / total,
             "images": int(self.present[i])}
            for i, name in enumerate(dataset.classes.names)
        ]  # fmt: skip
        return {"images": self.images, "ignored_pixels": self.ignored, "classes": rows}


def remembered_counts(source: str, dataset: Dataset) -> dict[str, SplitCount]:
    """The counts of all splits from the doctor's survey, which opens only masks that it has not seen."""
    with progress_bar("counting") as progress:
        found = survey(source, hashes=False, progress=lambda _, done, total: progress(done, total))
    rows, known = class_table(found), len(dataset.classes)
    counts = {}
    for split in dataset.splits:
        mine = {row.id: row for row in rows if row.split == split}
        pixels, present = (np.array([field(mine[i]) for i in range(known)], np.int64) for field in (_pixels, _images))
        counts[split] = SplitCount(dataset.count(split), pixels, present, mine[dataset.classes.ignore_index].pixels)
    return counts


def _pixels(row: ClassRow) -> int:
    return row.pixels


def _images(row: ClassRow) -> int:
    return row.images


def count_split(dataset: Dataset, split: str) -> SplitCount:
    """Count the pixels and images of each class."""
    ignore, total = dataset.classes.ignore_index, dataset.count(split)
    pixels = np.zeros(ignore + 1, np.int64)
    present = np.zeros(ignore + 1, np.int64)
    with progress_bar(f"counting {split}") as progress:
        for i in range(total):
            found = np.bincount(dataset.read(split, i).mask.ravel(), minlength=ignore + 1)
            pixels += found
            present += found > 0
            progress(i + 1, total)
    known = len(dataset.classes)
    return SplitCount(total, pixels[:known], present[:known], int(pixels[ignore]))


def channel_levels(dataset: Dataset, split: str, images: int) -> dict[str, list[float]] | None:
    """Mean and standard deviation of each channel in 0..1, over up to `images` images; ready for `input:`."""
    total = dataset.count(split)
    wanted = min(images, total)
    chosen = [i * total // wanted for i in range(wanted)]
    if not chosen:
        return None
    sums, squares, count = 0.0, 0.0, 0
    for i in chosen:
        values = dataset.read(split, i).image.reshape(-1, dataset.channels).astype(np.float64) / 255
        sums, squares, count = sums + values.sum(0), squares + np.square(values).sum(0), count + len(values)
    mean = np.asarray(sums) / count
    deviation = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0))
    return {"mean": [round(float(m), 4) for m in mean], "std": [round(float(d), 4) for d in deviation]}


def _text(
    dataset: Dataset, counts: dict[str, SplitCount], weights: dict[str, NDArray[np.float32]],
    levels: dict[str, list[float]] | None,
) -> str:  # fmt: skip
    head = ["class"]
    for split in counts:
        head += [f"{split} %", f"{split} images"]
    rows = [[*head, *(f"weight ({how})" for how in weights)]]
    for i, name in enumerate(dataset.classes.names):
        row = [name]
        for count in counts.values():
            row += [f"{100 * count.pixels[i] / max(count.pixels.sum(), 1):.3f}", f"{count.present[i]:,}"]
        rows.append([*row, *(f"{values[i]:.2f}" for values in weights.values())])
    parts = [aligned(rows)]
    for split, count in counts.items():
        share = count.ignored / max(count.ignored + int(count.pixels.sum()), 1)
        parts.append(f"{split}: {count.images:,} images, {100 * share:.2f} % of the pixels ignored")
    if levels is not None:
        parts.append(f"images in 0..1 (for input:): mean {levels['mean']}, std {levels['std']}")
    return "\n".join(parts)
