"""A way to read masks: classes and the raw values that mean them, as a description says or as the doctor proposes.

Colours   a mask's colours are codes red * 65536 + green * 256 + blue, as in `tables`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import Classes, Color
from segvit.data.decode import LabelRule
from segvit.data.doctor.evidence import code_of, color_of
from segvit.data.doctor.tables import Survey


class ClassEntry(NamedTuple):
    """One class."""

    name: str
    color: Color
    values: tuple[int, ...]  # raw numbers or colour codes
    why: str = ""  # the comment beside it


@dataclass(frozen=True)
class Reading:
    """What raw values mean."""

    colored: bool  # whether values are colour codes
    entries: tuple[ClassEntry, ...]
    ignored: dict[int, str] = field(default_factory=dict)  # raw value -> why
    nearest: bool = False
    changed: bool = False  # whether the description says something else
    remark: str = ""  # the comment above the classes

    @property
    def classes(self) -> Classes:
        """The class table."""
        return Classes(tuple(entry.name for entry in self.entries), tuple(entry.color for entry in self.entries))

    @property
    def rule(self) -> LabelRule:
        """The label rule."""
        ignore = self.classes.ignore_index
        ids = dict.fromkeys(self.ignored, ignore)
        ids |= {value: index for index, entry in enumerate(self.entries) for value in entry.values}
        if self.colored:
            colors = {color_of(code): index for code, index in ids.items()}
            return LabelRule.of_colors(colors, ignore, nearest=self.nearest)
        return LabelRule.of_numbers(ids, ignore, nearest=self.nearest)

    @property
    def is_identity(self) -> bool:
        """Whether value i is class i, as it is where nobody says otherwise."""
        return not self.colored and all(entry.values == (index,) for index, entry in enumerate(self.entries))

    def meaning(self) -> dict[int, int]:
        """The id of every listed value, and of the ignore id where it is ignored unasked."""
        ignore = self.classes.ignore_index
        unasked = {} if self.colored or self.nearest else {ignore: ignore}
        ids = unasked | dict.fromkeys(self.ignored, ignore)
        return ids | {value: index for index, entry in enumerate(self.entries) for value in entry.values}


def present_reading(survey: Survey) -> Reading | None:
    """What the present description says; None where nothing does."""
    classes, rule = survey.classes, survey.rule
    if classes is None or rule is None:
        return None
    description = survey.description
    colored = rule.table is None
    if description is not None and description.values:
        values = [tuple(map(_plain, raws)) for raws in description.values]
        ignored = [_plain(raw) for raw in description.ignored]
    else:
        values = [tuple(_values_of_id(rule, index)) for index in range(len(classes))]
        ignored = [value for value in _values_of_id(rule, rule.ignore) if colored or value != rule.ignore]
    entries = tuple(map(ClassEntry, classes.names, classes.palette, values))
    return Reading(colored, entries, dict.fromkeys(ignored, ""), nearest=rule.nearest)


def ids_of(raw: NDArray[np.int64], rule: LabelRule) -> NDArray[np.int32]:
    """The ids (n,) of raw numbers or colour codes (n,); -1 for what the rule does not know."""
    if rule.table is not None:
        inside = (raw >= 0) & (raw < len(rule.table))
        return np.where(inside, rule.table[raw.clip(0, len(rule.table) - 1)], -1)
    assert rule.codes is not None
    assert rule.ids is not None
    if rule.nearest:
        codes, which = np.unique(raw, return_inverse=True)
        return rule.ids[_nearest(codes, rule.codes)[which]]
    place = np.searchsorted(rule.codes, raw).clip(max=len(rule.codes) - 1)
    return np.where(rule.codes[place] == raw, rule.ids[place], -1)


def _nearest(codes: NDArray[np.int64], listed: NDArray[np.int32]) -> NDArray[np.int64]:
    """The place of the nearest of the listed colours, the lower of two."""
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1)  # (n, 3)
    distance = np.full(len(codes), np.iinfo(np.int64).max)
    place = np.zeros(len(codes), np.int64)
    for i, code in enumerate(listed.tolist()):
        here = ((colors - color_of(code)) ** 2).sum(1)
        place[here < distance] = i
        distance = np.minimum(distance, here)
    return place


def _plain(raw: int | Color) -> int:
    return raw if isinstance(raw, int) else code_of(raw)


def _values_of_id(rule: LabelRule, index: int) -> list[int]:
    if rule.table is not None:
        return np.flatnonzero(rule.table == index).tolist()
    assert rule.codes is not None
    return rule.codes[rule.ids == index].tolist()
