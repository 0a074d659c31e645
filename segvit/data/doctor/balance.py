"""How much there is of each class: pixels and images by split, from the survey alone, and what is amiss with that.

Shapes    n pairs of a mask and an id that occurs in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes
from segvit.data.doctor.evidence import EXAMPLES, counted, flatten, part_of, percent
from segvit.data.doctor.reading import ids_of
from segvit.data.doctor.tables import Finding, SplitSurvey, Survey

RARE = 1e-4  # share of the labelled pixels
RATIO = 100  # between the most and the least frequent class
MUCH_IGNORED = 0.5
UNKNOWN = -1
KEYS = 65537  # ids, the ignore id and UNKNOWN among them


class Labels(NamedTuple):
    """Which ids the masks of a split hold: n pairs of a mask and an id that occurs in it."""

    owner: NDArray[np.int64]  # (n,) the place of the mask in the split
    ids: NDArray[np.int64]  # (n,)
    pixels: NDArray[np.int64]  # (n,)

    def by_id(self, amounts: NDArray[np.int64]) -> Counter[int]:
        """The sum of amounts (n,) for each id."""
        ids, which = np.unique(self.ids, return_inverse=True)
        return Counter(dict(zip(ids.tolist(), np.bincount(which, amounts).astype(np.int64).tolist(), strict=True)))


class ClassRow(NamedTuple):
    """One class in one split; also what is ignored, and what the label rule does not know."""

    split: str
    id: int  # the ignore id for ignored pixels, -1 for values of no class
    name: str
    pixels: int
    share: float  # of the labelled pixels of the split; ignored and unknown: of all its pixels
    images: int  # in which it occurs

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return self._asdict()


def class_table(survey: Survey) -> list[ClassRow]:
    """Pixels and images of each class by split, the ignored and (if any) unknown pixels after the classes.

    Nothing without a class table. Masks with very many distinct values count by the most frequent of them.
    """
    if survey.classes is None or survey.rule is None:
        return []
    ignore = survey.classes.ignore_index
    rows: list[ClassRow] = []
    for split in survey.splits:
        labels = count_labels(split, survey)
        pixels, images = labels.by_id(labels.pixels), labels.by_id(np.ones_like(labels.pixels))
        total = sum(pixels.values())
        labelled = total - pixels[ignore] - pixels[UNKNOWN]
        for index, name in enumerate(survey.classes.names):
            rows.append(ClassRow(split.name, index, name, pixels[index], _part(pixels[index], labelled), images[index]))
        for index, name in ((ignore, "ignored"), (UNKNOWN, "in no class")):
            if index == ignore or pixels[index]:
                part = _part(pixels[index], total)
                rows.append(ClassRow(split.name, index, name, pixels[index], part, images[index]))
    return rows


def count_labels(split: SplitSurvey, survey: Survey) -> Labels:
    """The labels of all readable masks of a split under the rule of the survey, which there must be."""
    rule = survey.rule
    assert rule is not None
    masks = [pair.mask for pair in split.pairs]
    flat = flatten(masks, colored=rule.table is None)
    painted = [i for i, mask in enumerate(masks) if mask.coloured and rule.table is not None]
    keys = np.concatenate([flat.owner, np.array(painted, np.int64)])
    ids = np.concatenate([ids_of(flat.raw, rule), np.full(len(painted), UNKNOWN)])
    areas = np.array([sum(masks[i].values.values()) for i in painted], np.int64)
    pixels = np.concatenate([flat.pixels, areas])
    # Several values of a mask may mean the same.
    pairs, which = np.unique(keys * (KEYS + 1) + ids - UNKNOWN, return_inverse=True)
    return Labels(pairs // (KEYS + 1), pairs % (KEYS + 1) + UNKNOWN, np.bincount(which, pixels).astype(np.int64))


def empty_masks(survey: Survey) -> dict[str, list[str]]:
    """The stems by split of readable masks without any labelled pixel."""
    assert survey.classes is not None
    found: dict[str, list[str]] = {}
    for split in survey.splits:
        labels = count_labels(split, survey)
        useful = set(labels.owner[(labels.ids >= 0) & (labels.ids < len(survey.classes))].tolist())
        pairs = enumerate(split.pairs)
        found[split.name] = [pair.stem for i, pair in pairs if not pair.mask.error and i not in useful]
    return found


def judge_balance(survey: Survey) -> Iterator[Finding]:
    """What is amiss with the classes under the rule of the survey, which must know all values.

    Errors: `empty_mask` where all of train is ignored, `only_one_class`. Warnings: `empty_mask`, `many_ignored`,
    `absent_class`, `never_in_val`, `rare_class`. Note: `imbalance`.
    """
    if survey.classes is None:
        return
    rows = class_table(survey)
    labelled = {split.name: [row for row in rows if row.split == split.name and 0 <= row.id < len(survey.classes)]
                for split in survey.splits}  # fmt: skip
    yield from _emptiness(survey, rows)
    train = labelled.get("train", [])
    present = [row for row in train if row.pixels]
    if not present:
        return
    if len(present) == 1:
        missing = ", ".join(row.name for row in train if not row.pixels)
        sentence = f"all labelled pixels of train are {present[0].name}; there is nothing to tell apart"
        sentence += f": label {_cut(missing)}" if missing else "; add a second class"
        yield Finding("only_one_class", "error", sentence)
        return
    yield from _absence(survey.classes, train, labelled.get("val", []))
    rare = [row for row in present if row.share < RARE]
    if rare:
        shown = ", ".join(f"{row.name} {percent(row.share)} in {counted(row.images, 'image')}" for row in rare[:5])
        sentence = f"{counted(len(rare), 'class')} below {percent(RARE)} of the labelled pixels of train: {shown}"
        yield Finding("rare_class", "warning", f"{sentence}; label more of them, or merge by values:")
    most, least = max(present, key=lambda row: row.pixels), min(present, key=lambda row: row.pixels)
    if most.pixels >= RATIO * least.pixels:
        sentence = (
            f"{most.name} has {most.pixels / least.pixels:,.0f} times the pixels of {least.name}; if rare classes are "
            "learnt badly, try --class_balance log"
        )
        yield Finding("imbalance", "note", sentence)


def _emptiness(survey: Survey, rows: Sequence[ClassRow]) -> Iterator[Finding]:
    assert survey.classes is not None
    stems = empty_masks(survey)
    for split in survey.splits:
        empty = stems[split.name]
        readable = sum(not pair.mask.error for pair in split.pairs)
        files = tuple(pair.mask.path for pair in split.pairs if pair.stem in set(empty[:EXAMPLES]))
        if empty and len(empty) == readable and split.name == "train":
            sentence = "no pixel of the train masks is labelled: all are ignored; check the class table and the export"
            yield Finding("empty_mask", "error", sentence, files)
            return
        if empty:
            sentence = (
                f"{part_of(len(empty), readable, f'masks of {split.name}')} are ignored as a whole and teach nothing; "
                "label them, or leave them out by exclude:"
            )
            yield Finding("empty_mask", "warning", sentence, files)
        ignored = next(row for row in rows if row.split == split.name and row.id == survey.classes.ignore_index)
        if ignored.share > MUCH_IGNORED and len(empty) < readable:
            sentence = f"{percent(ignored.share)} of the pixels of {split.name} are ignored; check that this is meant"
            yield Finding("many_ignored", "warning", sentence)


def _absence(classes: Classes, train: Sequence[ClassRow], val: Sequence[ClassRow]) -> Iterator[Finding]:
    in_val = {row.id for row in val if row.pixels}
    absent = [row.name for row in train if not row.pixels]
    if absent:
        only = [classes.names[row.id] for row in train if not row.pixels and row.id in in_val]
        where = f" (in val only: {_cut(', '.join(only))})" if only else ""
        sentence = (
            f"{counted(len(absent), 'class')} without a pixel in train, so not learnt: {_cut(', '.join(absent))}"
            f"{where}; check the values, or remove what is not there"
        )
        yield Finding("absent_class", "warning", sentence)
    unseen = [row.name for row in train if row.pixels and row.id not in in_val]
    if unseen and val and any(row.pixels for row in val):
        shown = _cut(", ".join(unseen))
        sentence = f"{counted(len(unseen), 'class')} of train without a pixel in val, so without a score: {shown}"
        yield Finding("never_in_val", "warning", sentence)


def _cut(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


def _part(pixels: int, total: int) -> float:
    return pixels / total if total else 0.0
