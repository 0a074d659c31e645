"""The description that would make a dataset train, as YAML text whose comments say why each changed line is there."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from segvit.data.dataset import STEM
from segvit.data.description import SPLITS, Entry
from segvit.data.doctor.defects import Excluded
from segvit.data.doctor.evidence import show
from segvit.data.doctor.reading import Reading
from segvit.data.doctor.tables import Pair, SplitSurvey, Survey


@dataclass(frozen=True)
class Plan:
    """What a description should say, besides what the present one says rightly."""

    reading: Reading
    excluded: Excluded
    val_part: float | None = None  # instead of the present val
    val_why: str = ""
    channels: int | None = None

    @property
    def is_change(self) -> bool:
        """Whether it says anything new."""
        return self.reading.changed or any(self.excluded.values()) or bool(self.val_why) or self.channels is not None


def propose(survey: Survey, plan: Plan) -> str | None:
    """The text of a dataset.yaml; None where it would say nothing new, or would leave no training image."""
    if not plan.is_change or not _good_pairs(survey, plan, "train"):
        return None
    description = survey.description
    lines = ["# Proposed by segvit data check. Look at the lines that end in a comment.", f"path: {_path(survey)}"]
    entries = _entries(survey)
    present_part = description.val_part if description else _shared_part(entries)
    shared = present_part is not None
    val_part = plan.val_part or present_part
    for name in SPLITS:
        if name == "val" and val_part is not None:
            lines.append(f"val: {val_part:g}{_comment(plan.val_why)}")
        elif name in entries and _good_pairs(survey, plan, name):
            # A val that is a part of train has no entries of its own to leave files out of.
            lines += _split(survey, plan, (name, "val") if name == "train" and shared else (name,), entries[name])
    reading = plan.reading
    lines += ["classes:", *([f"  # {reading.remark}"] if reading.remark else []), *_classes(reading)]
    lines += _ignored(reading)
    if reading.nearest:
        lines.append("nearest: true # other values are read as the nearest listed one: borders are only about right")
    if plan.channels is not None:
        lines.append(f"channels: {plan.channels} # as the images have")
    elif description and description.channels != 3:
        lines.append(f"channels: {description.channels}")
    if description and description.range:
        low, high = description.range
        lines.append(f"range: [{low:g}, {high:g}]")
    return "\n".join(lines) + "\n"


def _path(survey: Survey) -> str:
    source = survey.source
    base = source.parent if source.suffix.lower() in (".yaml", ".yml") else source
    try:
        return _scalar(Path(os.path.relpath(survey.root, base)).as_posix())
    except ValueError:  # on another drive
        return _scalar(survey.root.absolute().as_posix())


def _entries(survey: Survey) -> Mapping[str, tuple[Entry, ...]]:
    """The entries by split: those of the description, else as the survey found them."""
    if survey.description:
        return survey.description.splits
    return {split.name: (Entry(split.images, split.masks),) for split in survey.splits}


def _shared_part(entries: Mapping[str, tuple[Entry, ...]]) -> float | None:
    """Without a description, a val of the same folders as train is a part of it."""
    return 0.2 if "val" in entries and entries["val"] == entries.get("train") else None


def _good_pairs(survey: Survey, plan: Plan, name: str) -> list[Pair]:
    return [
        pair
        for split in survey.splits
        if split.name == name
        for pair in split.pairs
        if pair.stem not in plan.excluded.get(name, {})
    ]


def _split(survey: Survey, plan: Plan, names: tuple[str, ...], entries: Sequence[Entry]) -> Iterator[str]:
    """The lines of the first of the splits, whose files are those of all; entries of which nothing is left go."""
    splits = [split for split in survey.splits if split.name in names]
    reasons = {stem: why for part in names for stem, why in plan.excluded.get(part, {}).items()}
    places = {pair.stem: pair.image.path for split in splits for pair in split.pairs}
    kept = [entry for entry in entries if _has_good(entry, splits, reasons)]
    yield f"{names[0]}:"
    for entry in kept:
        here = {stem: why for stem, why in reasons.items() if stem not in places or _inside(entry, places[stem])}
        first, indent = ("  - ", "    ") if len(entries) > 1 else ("  ", "  ")
        yield f"{first}images: {_scalar(entry.images)}"
        yield f"{indent}masks: {_scalar(entry.masks)}"
        if entry.list is not None:
            yield f"{indent}list: {_scalar(entry.list)}"
        if entry.exclude or here:
            yield f"{indent}exclude:"
            for pattern in entry.exclude:
                yield f"{indent}  - {_scalar(pattern)}"
            for stem, why in sorted(here.items(), key=lambda item: (item[1], item[0])):
                yield f"{indent}  - {_scalar(_literal(stem))}{_comment(why)}"


def _has_good(entry: Entry, splits: Sequence[SplitSurvey], reasons: Mapping[str, str]) -> bool:
    return any(pair.stem not in reasons and _inside(entry, pair.image.path) for split in splits for pair in split.pairs)


def _inside(entry: Entry, path: str) -> bool:
    """Whether an image lies in the folder of an entry."""
    folder = entry.images.partition(STEM)[0].rpartition("/")[0] if STEM in entry.images else entry.images
    folder = Path(folder).as_posix()
    return folder == "." or Path(path).is_relative_to(folder)


def _classes(reading: Reading) -> Iterator[str]:
    for index, entry in enumerate(reading.entries):
        values = ", ".join(show(value, colored=reading.colored) for value in entry.values)
        fields = f"name: {_scalar(entry.name)}, color: {list(entry.color)}, values: [{values}]"
        yield f"  {index}: {{{fields}}}{_comment(entry.why)}"


def _ignored(reading: Reading) -> Iterator[str]:
    if not any(reading.ignored.values()):
        if reading.ignored:
            yield f"ignore: [{', '.join(show(value, colored=reading.colored) for value in sorted(reading.ignored))}]"
        return
    yield "ignore:"
    for value, why in sorted(reading.ignored.items()):
        yield f"  - {show(value, colored=reading.colored)}{_comment(why)}"


def _literal(stem: str) -> str:
    """A stem as `exclude:` reads it, which takes * ? [ for patterns."""
    return glob.escape(stem) if any(sign in stem for sign in "*?[") else stem


def _scalar(text: str) -> str:
    """A string in YAML, quoted where it has to be."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=1 << 30).strip()[1:-1]


def _comment(why: str) -> str:
    return f" # {' '.join(why.split())}" if why else ""
