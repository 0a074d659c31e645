"""Whole volumes: what an evaluation or a prediction finds slice by slice is put together again, one volume at a time.

Protocols  `medpy`, `monai` and `deepmind` measure surfaces as these packages do (`segvit.metrics.volume`), with the
           volumes' own spacing and empty masks left out. `transunet` is the rule of the Synapse tables that CASTformer
           reports in: medpy's surfaces, distances in voxels, TransUNet's values for empty masks; its mean over the
           cases and then over the classes is the mean Dice of these papers.

Shapes    D slices, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes, Sample, UserError
from segvit.data.volumes import Case, read_grid, read_scan, write_labels
from segvit.files import write_json
from segvit.inference.predictor import Predictor
from segvit.metrics.ratios import mean, number
from segvit.metrics.volume import Empty, Package, Spacing, VolumeScores, VolumeTable
from segvit.tasks.console import aligned

Convention = Literal["medpy", "monai", "deepmind", "transunet"]


class Protocol(NamedTuple):
    """How volumes are measured."""

    package: Package
    empty: Empty
    spacing: Spacing  # None = each volume's own


TRANSUNET = Protocol("medpy", "transunet", "voxel")


@dataclass(frozen=True)
class _Open:
    """The volume whose slices are coming in."""

    case: Case
    pred: list[NDArray[Any] | None]
    label: list[NDArray[Any] | None]


class VolumeCollector:
    """Takes the slices of an evaluation in any order within a case, and measures each volume once it is whole.

    Give it to `evaluate` as `watch`. Memory holds the labels of one volume. Raises UserError for slices of unequal
    sizes, and for a volume that has no spacing where the protocol has none either.
    """

    def __init__(self, cases: Sequence[Case], classes: Classes, protocol: Protocol) -> None:
        self.protocol, self.classes = protocol, classes
        self.places = {index: (case, place) for case in cases for place, index in enumerate(case.indices)}
        self.table = VolumeTable(len(classes), classes.ignore_index, package=protocol.package, empty=protocol.empty)
        self.open: dict[str, _Open] = {}
        for case in cases:
            self.spacing(case)  # before hours of prediction, not after

    def __call__(self, index: int, sample: Sample, labels: NDArray[Any]) -> None:
        case, place = self.places[index]
        count = len(case.indices)
        held = self.open.setdefault(case.name, _Open(case, [None] * count, [None] * count))
        held.pred[place], held.label[place] = labels, sample.mask
        first = next(one for one in held.label if one is not None)
        if sample.mask.shape != first.shape:
            raise UserError(f"{sample.name} is {sample.mask.shape} but other slices of {case.name} are {first.shape}")
        if all(one is not None for one in held.label):
            pred, label = (np.stack([one for one in part if one is not None]) for part in (held.pred, held.label))
            self.table.update(case.name, pred, label, spacing=self.spacing(case))
            del self.open[case.name]

    def spacing(self, case: Case) -> Spacing:
        """The spacing that a case is measured in."""
        spacing = case.spacing if self.protocol.spacing is None else self.protocol.spacing
        if spacing is None:
            raise UserError(
                f"{case.name} has no spacing; give --spacing D,H,W in millimetres, or --spacing voxel to measure in "
                "voxels, as the tables of Synapse and ACDC do"
            )
        return spacing

    def record(self) -> dict[str, Any]:
        """Everything measured, ready for JSON: means, classes and each volume by name."""
        record = self.table.to_json()
        for row, name in zip(record["classes"], self.classes.names[1:], strict=True):
            row["name"] = name
        record["spacing"] = "own" if self.protocol.spacing is None else self.protocol.spacing
        record["volumes"] = [
            {"name": name} | {column: number(value) for column, value in self._means(name).items()}
            for name in self.table.cases
        ]
        return record

    def text(self) -> str:
        """A table for people: each volume, then each class, then the means."""
        columns = [name.upper() if name in ("hd95", "asd", "assd") else name.title() for name in VolumeScores._fields]
        rows: list[Sequence[str]] = [("volume or class", *columns)]
        rows += [(name, *map(_cell, self._means(name).values())) for name in self.table.cases]
        for name, row in zip(self.classes.names[1:], self.table.classes(), strict=True):
            rows.append((name, *map(_cell, row)))
        rows.append(("mean over classes", *map(_cell, self.table.means())))
        unit = "voxels" if self.protocol.spacing == "voxel" else "mm"
        return f"{aligned(rows)}\nvolumes: surfaces of {self.table.package}, {unit}, empty masks: {self.table.empty}"

    def _means(self, case: str) -> dict[str, float]:
        return dict(zip(VolumeScores._fields, map(mean, self.table.cases[case].T), strict=True))


def make_protocol(convention: Convention, *, spacing: str | None, empty: Empty | None) -> Protocol:
    """A convention, with another spacing (`own`, `voxel`, or D,H,W in millimetres) or rule for empty masks if given."""
    usual = TRANSUNET if convention == "transunet" else Protocol(convention, "exclude", None)
    step: Spacing = usual.spacing
    if spacing == "own":
        step = None
    elif spacing is not None:
        step = "voxel" if spacing == "voxel" else _numbers(spacing)
    return Protocol(usual.package, empty or usual.empty, step)


def predict_volume(predictor: Predictor, source: Path, paths: dict[str, Path]) -> None:
    """Segment a volume slice by slice and write `paths`: its labels on the scan's grid, and `areas` where named."""
    grid, spec = read_grid(source), predictor.run.spec
    labels = np.empty(grid.shape, predictor.run.classes.dtype)
    for k in range(grid.shape[0]):
        image = read_scan(source, k, channels=spec.channels, levels=spec.levels)
        labels[k] = predictor.segment(image)[0]
    write_labels(paths["labels"], labels, source)
    if "areas" in paths:
        counts = np.bincount(labels.ravel(), minlength=len(predictor.run.classes))
        voxel = None if grid.spacing is None else math.prod(grid.spacing) / 1000
        present = [
            {
                "id": i, "name": name, "voxels": int(counts[i]), "fraction": float(counts[i] / labels.size),
                "millilitres": None if voxel is None else float(counts[i] * voxel),
            }
            for i, name in enumerate(predictor.run.classes.names) if counts[i]
        ]  # fmt: skip
        write_json(paths["areas"], {"name": str(source), "shape": list(grid.shape), "classes": present})


def _numbers(text: str) -> tuple[float, ...]:
    try:
        steps = tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        steps = ()
    if len(steps) != 3 or not all(math.isfinite(step) and step > 0 for step in steps):
        raise UserError(f"spacing is {text!r}; give own, voxel, or millimetres along D, H, W such as 5,0.8,0.8")
    return steps


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
