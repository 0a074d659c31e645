"""What the values found in masks mean as classes, judged against the class table or, where there is none, guessed.

Values arrive exact: blurred ones were replaced by those that were meant. A table is kept wherever it fits; a guess says
"probably" in its comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from segvit.contracts import Color
from segvit.data.doctor.evidence import Seen, code_of, color_of, counted, part_of, percent, show_values
from segvit.data.doctor.reading import ClassEntry, Reading
from segvit.data.doctor.tables import Finding
from segvit.palette import generate_palette

TOPS = (255, 65535)  # white in 8 and 16 bits
STEP = 8  # levels between two classes from which masks look drawn as grey pictures
TOO_MANY = 1000  # values that nobody lists as classes by hand
FULL = 230  # of the 256 values of 8 bits, which pictures have but no known set of classes
MOSTLY = 0.5  # part of the pixels above which it makes no sense to ignore them
BLACK = 0
NOT_A_CLASS = {
    "background",
    "_background_",
    "bg",
    "none",
    "other",
    "others",
    "unlabeled",
    "unlabelled",
    "void",
    "ignore",
}


class Answer(NamedTuple):
    """A way to read the values, what was wrong, and the values that show it."""

    reading: Reading | None
    findings: list[Finding]
    values: frozenset[int] = frozenset()


def judge(
    seen: dict[int, Seen], *, masks: int, colored: bool, basis: Reading | None, hint: Reading | None
) -> Answer:  # fmt: skip
    """What the values mean: by the table `basis` where it fits; `hint` knows names and colours of the classes."""
    if basis is None:
        return name_colors(seen, hint) if colored else name_numbers(seen, masks)
    known = basis.meaning()
    unknown = sorted(seen.keys() - known.keys())
    if not colored:
        for question in (white_class, from_one, zero_is_none, in_order):
            answer = question(seen, masks, basis, unknown)
            if answer is not None:
                return answer
    if not unknown or basis.nearest:
        return Answer(basis, [])
    if colored:
        swapped = blue_first(seen, basis)
        if swapped is not None:
            return swapped
    return not_listed(seen, masks, basis, unknown)


def name_numbers(seen: dict[int, Seen], masks: int) -> Answer:
    """Classes from numbers alone: `binary_255`, `gray_levels`, `one_based` or `no_classes`."""
    values = sorted(seen)
    if len(values) > (FULL if values[-1] < 256 else TOO_MANY):
        sentence = (
            f"{len(values):,} distinct values in the masks: probably instances, depths or blurred pictures, not "
            "classes; export masks of class ids"
        )
        return Answer(None, [_error("too_many_values", sentence)], frozenset(values))
    if len(values) == 2 and values[0] == 0 and values[1] in TOPS:
        return white_class(seen, masks, Reading(False, ()), values) or Answer(None, [])
    even = evenly_spaced(values)
    void = [value for value in values if value in TOPS and not even and len(values) > 1]
    classes = [value for value in values if value not in void]
    if even:
        finding = _gray(values, masks)
    elif len(classes) > 1 and classes[0] == 1 and classes[-1] <= 2 * len(classes):
        finding = _one_based(classes, seen, masks)
    else:
        sentence = (
            f"nothing says which value is which class; the masks hold {show_values(values)}; name the classes in "
            "dataset.yaml, or in classes.txt where values are 0, 1, 2, ..."
        )
        finding = _error("no_classes", sentence)
    ignored = dict.fromkeys(void, "probably: the usual value for pixels to ignore")
    return Answer(Reading(False, _unnamed(classes, seen, colored=False), ignored, changed=True), [finding])


def name_colors(seen: dict[int, Seen], hint: Reading | None) -> Answer:
    """Classes from colours: those whose colour the table has by name, else without names."""
    codes = sorted(seen)
    if len(codes) > TOO_MANY:
        sentence = f"{len(codes):,} colours in the masks: these look like pictures, not masks; check the masks folder"
        return Answer(None, [_error("too_many_values", sentence)], frozenset(codes))
    if hint is None:
        return Answer(Reading(True, _unnamed(codes, seen, colored=True), changed=True), [])
    by_color = {code_of(entry.color): entry for entry in hint.entries}
    found = {code for code in codes if code in by_color}
    part = sum(seen[code].pixels for code in found) / sum(value.pixels for value in seen.values())
    if len(found) == len(codes) or (len(found) > 1 and part >= 0.5):
        entries = tuple(entry._replace(values=(code_of(entry.color),)) for entry in hint.entries)
        others = {code: _amount(seen[code], "in no class") for code in codes if code not in found}
        return Answer(Reading(True, entries, others, changed=True), [])
    names = [entry.name for entry in hint.entries]
    if len(codes) == len(names) == 2 and BLACK in codes:
        entries = tuple(
            ClassEntry(name, color_of(code), (code,), "probably: black is the first class")
            for name, code in zip(names, codes, strict=True)
        )
        return Answer(Reading(True, entries, changed=True), [])
    remark = f"which colour is which class? The names were: {_names(hint)}"
    return Answer(Reading(True, _unnamed(codes, seen, colored=True), changed=True, remark=remark), [])


def white_class(seen: dict[int, Seen], masks: int, basis: Reading, _: Sequence[int]) -> Answer | None:
    """`binary_255`: only {0, 255} occurs, at most two classes are named and none of them is 255."""
    values = sorted(seen)
    if len(values) != 2 or values[0] != 0 or len(basis.entries) > 2:
        return None
    top, ignore = values[1], basis.classes.ignore_index
    if top not in TOPS or basis.meaning().get(top, ignore) != ignore:
        return None
    names = [entry.name for entry in basis.entries]
    if len(names) < 2:
        only = names[0] if names else "foreground"
        names = [only, "foreground"] if only.lower() in NOT_A_CLASS else ["background", only]
    colors = [entry.color for entry in basis.entries] if len(basis.entries) == 2 else generate_palette(2)
    whys = ("", f"two-class masks stored as 0/{top}")
    entries = tuple(map(ClassEntry, names, colors, ((0,), (top,)), whys))
    lost = f", where {top} is ignored unless a class lists it" if basis.entries and top == ignore else ""
    sentence = (
        f"values {{0, {top}}} in {part_of(masks, masks, 'masks')}: two-class masks stored as 0/{top}{lost}; write "
        f"values: [{top}] for class 1"
    )
    found = _error("binary_255", sentence)
    ignored = {value: why for value, why in basis.ignored.items() if value != top}
    return Answer(Reading(False, entries, ignored, changed=True), [found], frozenset(values))


def from_one(seen: dict[int, Seen], masks: int, basis: Reading, unknown: Sequence[int]) -> Answer | None:
    """`one_based`: K classes of values 0 to K - 1 are named, 0 never occurs, K does and nothing else is unknown."""
    count = len(basis.entries)
    if not basis.is_identity or 0 in seen or list(unknown) != [count]:
        return None
    entries = tuple(
        entry._replace(values=(index + 1,), why="ids in the masks start at 1" if not index else "")
        for index, entry in enumerate(basis.entries)
    )
    classes = sorted(value for value in seen if value <= count)
    return Answer(replace(basis, entries=entries, changed=True), [_one_based(classes, seen, masks)], frozenset(classes))


def zero_is_none(seen: dict[int, Seen], masks: int, basis: Reading, unknown: Sequence[int]) -> Answer | None:
    """`zero_is_other`: K classes are named, none for pixels without class, and the values are 0 to K, K alone unknown.

    ADE20K's files are so. With one class or a first name such as background it is not said.
    """
    count = len(basis.entries)
    named = basis.entries[0].name.lower() in NOT_A_CLASS
    if not basis.is_identity or 0 not in seen or list(unknown) != [count] or count < 2 or named:
        return None
    entries = tuple(entry._replace(values=(index + 1,)) for index, entry in enumerate(basis.entries))
    ignored = {**basis.ignored, 0: _amount(seen[0], "probably: pixels of no class")}
    sentence = (
        f"values up to {count} but {count} classes named, of which the last has value {count - 1}: probably 0 means no "
        "class and value 1 is the first; write ignore: [0] and values: [1] for class 0, or name what 0 is"
    )
    found = _error("zero_is_other", sentence)
    return Answer(replace(basis, entries=entries, ignored=ignored, changed=True), [found], frozenset([count]))


def in_order(seen: dict[int, Seen], masks: int, basis: Reading, unknown: Sequence[int]) -> Answer | None:
    """`gray_levels` or `unknown_values` where as many values occur as classes are named, but other ones.

    Only where at most one named class would be left. Evenly spaced values of another number get classes without names.
    """
    if not unknown or not basis.is_identity:
        return None
    known, count = basis.meaning(), len(basis.entries)
    values = sorted(seen)
    even = evenly_spaced(values)
    if not even:
        values = [value for value in values if known.get(value, 0) < count]
    left = [value for value in values if known.get(value, count) < count]
    if len(left) > 1 or (len(values) != count and not even):
        return None
    if len(values) != count:
        remark = f"which value is which class? The names were: {_names(basis)}"
        entries = _unnamed(values, seen, colored=False)
        return Answer(Reading(False, entries, changed=True, remark=remark), [_gray(values, masks)], frozenset(values))
    entries = tuple(
        entry._replace(values=(value,), why="" if value == index else "probably: values in the order of the classes")
        for index, (entry, value) in enumerate(zip(basis.entries, values, strict=True))
    )
    if even:
        found = _gray(values, masks)
    else:
        sentence = (
            f"values {show_values(unknown)} are in no class, and as many values occur as classes are named: probably "
            f"they are in this order; write values: [{values[-1]}] for class {count - 1} and so on"
        )
        found = _error("unknown_values", sentence)
    return Answer(replace(basis, entries=entries, changed=True), [found], frozenset(unknown))


def blue_first(seen: dict[int, Seen], basis: Reading) -> Answer | None:
    """`wrong_palette`: the colours are those of the table with red and blue exchanged, as some libraries store them."""

    def exchange(code: int) -> int:
        return (code & 255) << 16 | code & 0xFF00 | code >> 16

    if not {exchange(code) for code in seen} <= basis.meaning().keys():
        return None
    entries = tuple(
        entry._replace(values=tuple(map(exchange, entry.values)), why="red and blue exchanged")
        for entry in basis.entries
    )
    ignored = {exchange(code): why for code, why in basis.ignored.items()}
    sentence = (
        "wrong palette: the colours are those of the class table with red and blue exchanged (a library that reads BGR "
        "wrote them); write the colours as they are in the files, or save the masks again"
    )
    found = _error("wrong_palette", sentence)
    return Answer(replace(basis, entries=entries, ignored=ignored, changed=True), [found], frozenset(seen))


def not_listed(seen: dict[int, Seen], masks: int, basis: Reading, unknown: Sequence[int]) -> Answer:
    """`unknown_values`: values that no class lists, proposed to be ignored if classes and most pixels remain."""
    colored, known = basis.colored, basis.meaning()
    pixels = sum(value.pixels for value in seen.values())
    part = sum(seen[value].pixels for value in unknown) / pixels
    most = max(seen[value].masks for value in unknown)
    what = "colours" if colored else "values"
    remedy = "list them under values: of their classes, or under ignore:"
    shown = show_values(unknown, colored=colored)
    sentence = (
        f"{what} {shown} are in no class: {percent(part)} of the pixels, in {part_of(most, masks, 'masks')} at least"
    )
    if any(known.get(value, len(basis.entries)) < len(basis.entries) for value in seen):
        if part > MOSTLY:
            sentence += "; probably the class table is not the one of these masks"
            return Answer(None, [_error("unknown_values", f"{sentence}; {remedy}")], frozenset(unknown))
        ignored = basis.ignored | {value: _amount(seen[value], "look: in no class") for value in unknown}
        reading = replace(basis, ignored=ignored, changed=True)
        return Answer(reading, [_error("unknown_values", f"{sentence}; {remedy}")], frozenset(unknown))
    reading = Reading(
        colored, _unnamed(unknown, seen, colored=colored), basis.ignored, changed=True,
        remark=f"no {what[:-1]} of the class table occurs; which is which? The names were: {_names(basis)}",
    )  # fmt: skip
    sentence = f"{sentence}, and no {what[:-1]} of the table occurs; {remedy}"
    return Answer(reading, [_error("unknown_values", sentence)], frozenset(unknown))


def evenly_spaced(values: Sequence[int]) -> bool:
    """Whether values from 0 on have equal, wide gaps, but for rounding."""
    gaps = [high - low for low, high in pairwise(values)]
    return bool(gaps) and values[0] == 0 and min(gaps) >= STEP and max(gaps) - min(gaps) <= 1


def _gray(values: Sequence[int], masks: int) -> Finding:
    sentence = (
        f"evenly spaced grey levels {show_values(values)} in {counted(masks, 'mask')}: probably drawn as grey "
        f"pictures; write values: [{values[1]}] for class 1 and so on"
    )
    return _error("gray_levels", sentence)


def _one_based(classes: Sequence[int], seen: dict[int, Seen], masks: int) -> Finding:
    sentence = (
        f"ids start at 1, 0 never occurs: values {show_values(classes)} in {counted(masks, 'mask')}; write "
        "values: [1] for class 0, values: [2] for class 1 and so on"
    )
    return _error("one_based", sentence)


def _unnamed(values: Sequence[int], seen: dict[int, Seen], *, colored: bool) -> tuple[ClassEntry, ...]:
    """A class for each value, called class_0 and so on, of two with 0 or black background and foreground."""
    binary = len(values) == 2 and values[0] == 0
    names = ["background", "foreground"] if binary else [f"class_{i}" for i in range(len(values))]
    palette: Sequence[Color] = [color_of(code) for code in values] if colored else generate_palette(len(values))
    return tuple(
        ClassEntry(names[i], palette[i], (value,), _amount(seen[value], "name it")) for i, value in enumerate(values)
    )


def _names(reading: Reading) -> str:
    return ", ".join(entry.name for entry in reading.entries)


def _amount(value: Seen, question: str) -> str:
    return f"{question}, {counted(value.pixels, 'pixel')} in {counted(value.masks, 'mask')}"


def _error(kind: str, sentence: str) -> Finding:
    return Finding(kind, "error", sentence)
