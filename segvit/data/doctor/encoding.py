"""Which raw value of the masks means which class: what is wrong with the present answer, and a better one.

Each question is asked once and in this order: numbers or colours, exact or blurred, then what the values mean. All
splits are looked at together. Every finding is an error (`segvit train` would stop, or learn something else) unless it
says otherwise. What cannot be known from the files is called probable in the sentence and in the proposed YAML.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from segvit.data.doctor import meaning
from segvit.data.doctor.blur import judge_blur
from segvit.data.doctor.evidence import (
    Seen,
    code_of,
    color_of,
    examples,
    gather,
    part_of,
    percent,
    readable_masks,
    show,
    show_values,
    values_of,
)
from segvit.data.doctor.reading import Reading, present_reading
from segvit.data.doctor.tables import Finding, MaskFile, Survey

VALUES = 65536  # ids that a mask may hold


class Kind(NamedTuple):
    """What the masks hold, and what a description says of such values."""

    colored: bool
    basis: Reading | None  # None where nothing says which values are which classes
    hint: Reading | None  # names and colours of classes, where there are any
    finding: Finding | None = None
    painted: tuple[MaskFile, ...] = ()  # masks in colours where numbers are expected, or nothing is


def judge_encoding(survey: Survey) -> tuple[Reading | None, list[Finding]]:
    """How the masks should be read, and what is wrong with how they are; None where no description can help."""
    masks, present = readable_masks(survey), present_reading(survey)
    if not masks:
        return present, []
    kind = values_or_colors(masks, present)
    findings = [kind.finding] if kind.finding else []
    seen = gather(masks, colored=kind.colored)
    if not kind.colored and not all(0 <= value < VALUES for value in seen):
        return None, [*findings, beyond_range(masks, seen)]
    blur = judge_blur(masks, seen, colored=kind.colored, basis=kind.basis, hint=kind.hint)
    if blur is not None:
        findings.append(blur.finding)
        if blur.seen is None:
            return None, findings
        seen = blur.seen
    if kind.painted:
        findings.append(rgb_masks(kind.painted, len(masks), seen))
    answer = meaning.judge(seen, masks=len(masks), colored=kind.colored, basis=kind.basis, hint=kind.hint)
    findings += [replace(finding, files=holding(masks, answer.values, kind)) for finding in answer.findings]
    if not kind.colored:
        findings += [*deep_numbers(masks, seen), *mixed_binary(masks, answer.reading)]
    reading = answer.reading
    if reading is not None and (blur is not None or kind.finding is not None or kind.painted):
        reading = replace(reading, changed=True, nearest=reading.nearest or blur is not None)
        reading = with_ignore(reading, seen) if reading.nearest else reading
    return reading, findings


def values_or_colors(masks: Sequence[MaskFile], present: Reading | None) -> Kind:
    """Whether masks are read by number or by colour.

    Findings: `rgb_masks` (painted in colours, but values are numbers or nothing says), `wrong_palette` (the same colour
    stands for different ids in different palette files), `numbers_not_colors` (no colour of the table occurs, and the
    masks hold numbers).
    """
    painted = [mask for mask in masks if mask.coloured]
    if present is not None and present.colored:
        known = {code for entry in present.entries for code in entry.values} | set(present.ignored)
        codes = gather(masks, colored=True).keys() - {0}  # black is what both take for 0
        if painted or present.nearest or not codes or known & codes:
            return Kind(True, present, present)
        entries = tuple(entry._replace(values=(index,)) for index, entry in enumerate(present.entries))
        found = show_values(list(gather(masks, colored=False)))
        sentence = (
            f"the classes are colours but the masks hold the numbers {found}; write them as values, such as values: [0]"
        )
        identity = Reading(False, entries, changed=True)
        return Kind(False, identity, present, _error("numbers_not_colors", sentence, masks))
    if painted:
        return Kind(True, None, present, painted=tuple(painted))
    clash = palette_clash(masks)
    if clash is not None and all(mask.palette for mask in masks):
        return Kind(True, None, present and by_palette(masks, present), clash)
    return Kind(False, present, present, clash)


def rgb_masks(painted: Sequence[MaskFile], masks: int, seen: dict[int, Seen]) -> Finding:
    """`rgb_masks`: the colours that masks are painted in."""
    pixels = sum(value.pixels for value in seen.values())
    top = sorted(seen, key=lambda code: (-seen[code].pixels, code))[:11]
    shown = ", ".join(f"{show(code, colored=True)} {percent(seen[code].pixels / pixels)}" for code in top)
    more = ", ..." if len(seen) > len(top) else ""
    sentence = (
        f"RGB palette masks: {part_of(len(painted), masks, 'masks')} painted in {len(seen):,} colours: {shown}{more}; "
        "write the colours as values of the classes"
    )
    return _error("rgb_masks", sentence, painted)


def palette_clash(masks: Sequence[MaskFile]) -> Finding | None:
    """`wrong_palette`: a colour stands for one id in some palette files and for another id in others.

    Only said where colours tell ids apart within every file: palettes with repeated colours prove nothing.
    """
    meant: dict[int, dict[int, str]] = defaultdict(dict)  # colour -> id -> a file where it is so
    files: Counter[int] = Counter()
    for mask in masks:
        if mask.palette and len(values_of(mask, colored=True)) < len(mask.values):
            return None
        for value, color in mask.palette.items():
            code = code_of(color)
            meant[code].setdefault(value, mask.path)
            files[code] += 1
    clashes = [code for code in sorted(meant, key=lambda code: -files[code]) if len(meant[code]) > 1]
    if not clashes:
        return None
    code = clashes[0]
    (first, there), (second, here) = list(meant[code].items())[:2]
    number = f"{len(clashes)} colours stand" if len(clashes) > 1 else "a colour stands"
    sentence = (
        f"wrong palette: {number} for different ids: {list(color_of(code))} is {first} in {there} and {second} in "
        f"{here}; read the masks by colour: write the colours as values of the classes"
    )
    return Finding("wrong_palette", "error", sentence, (there, here))


def by_palette(masks: Sequence[MaskFile], present: Reading) -> Reading:
    """The class table with the colour that stands for each id in most files; as it is where that is not clear."""
    votes: Counter[tuple[int, int]] = Counter()
    ids = present.meaning()
    for mask in masks:
        for value, color in mask.palette.items():
            votes[code_of(color), ids.get(value, -1)] += 1
    chosen: dict[int, int] = {}  # class -> colour
    taken: set[int] = set()
    for (code, index), _ in votes.most_common():
        if code not in taken and index not in chosen and 0 <= index < len(present.entries):
            chosen[index] = code
            taken.add(code)
    if {code for code, _ in votes} != taken:
        return present
    entries = [
        entry._replace(color=color_of(chosen[i]), why="probably: as in most files") if i in chosen else entry
        for i, entry in enumerate(present.entries)
    ]
    return replace(present, entries=tuple(entries))


def with_ignore(reading: Reading, seen: dict[int, Seen]) -> Reading:
    """The ignore id listed: reading by nearness ignores only what is listed."""
    ignore = reading.classes.ignore_index
    listed = {value for entry in reading.entries for value in entry.values} | reading.ignored.keys()
    if reading.colored or ignore in listed or ignore not in seen:
        return reading
    return replace(reading, ignored={**reading.ignored, ignore: ""})


def beyond_range(masks: Sequence[MaskFile], seen: dict[int, Seen]) -> Finding:
    """`values_beyond_range`: numbers that are no 16-bit ids, which no description can help."""
    bad = [mask for mask in masks if any(not 0 <= value < VALUES for value in mask.values)]
    sentence = (
        f"values span {min(seen):,}..{max(seen):,} in {part_of(len(bad), len(masks), 'masks')} but ids lie in "
        "0..65535: probably these are instance numbers or measurements; export masks of class ids"
    )
    return _error("values_beyond_range", sentence, bad)


def deep_numbers(masks: Sequence[MaskFile], seen: dict[int, Seen]) -> list[Finding]:
    """`sixteen_bit`, a note: values that need more than 8 bits."""
    deep = [mask for mask in masks if max(mask.values, default=0) > 255]
    if not deep:
        return []
    sentence = (
        f"16-bit masks: values up to {max(seen):,} in {part_of(len(deep), len(masks), 'masks')}; fine where each value "
        "is listed under values:, wrong where they are instance numbers"
    )
    return [Finding("sixteen_bit", "note", sentence, examples(deep))]


def mixed_binary(masks: Sequence[MaskFile], reading: Reading | None) -> list[Finding]:
    """`mixed_binary`, a warning: of two classes, some masks hold {0, 1} and others {0, 255}, where 255 is ignored."""
    if reading is None or len(reading.entries) != 2 or reading.meaning().get(255) != reading.classes.ignore_index:
        return []
    ones = [mask for mask in masks if mask.values.keys() == {0, 1}]
    whites = [mask for mask in masks if mask.values.keys() == {0, 255}]
    both = any(mask.values.keys() >= {1, 255} for mask in masks)
    if both or not ones or not whites:
        return []
    sentence = (
        f"{part_of(len(whites), len(masks), 'masks')} hold {{0, 255}} and {len(ones):,} hold {{0, 1}}, none both: "
        "probably 255 means class 1 and is not to be ignored; then write values: [1, 255] for class 1"
    )
    return [Finding("mixed_binary", "warning", sentence, examples(whites))]


def holding(masks: Sequence[MaskFile], values: frozenset[int], kind: Kind) -> tuple[str, ...]:
    """Examples of masks that hold one of the values."""
    return examples([mask for mask in masks if values & values_of(mask, colored=kind.colored).keys()])


def _error(kind: str, sentence: str, masks: Sequence[MaskFile]) -> Finding:
    return Finding(kind, "error", sentence, examples(masks))
