"""Reads the YAML that describes a dataset: where images and masks lie, which raw value of a mask is which class.

    path: .                                # relative to this file
    train: {images: images/train, masks: masks/train, list: lists/train.txt, exclude: ["bad_*"]}
    val: {images: images/val, masks: "masks/val/{stem}_mask.png"}
    classes:
      0: {name: road, color: [128, 64, 128], values: [7, 8]}
      1: car                               # short for {name: car, values: [1]}
    ignore: [0]
    nearest: false                         # true: a value that is not listed is read as the nearest one that is
    channels: 3
    range: [0, 255]                        # the raw levels of images that become 0 and 255

A split may be a list of such entries, and `val` a part of train such as 0.2. Raw values are numbers (`7`) or colours
(`[128, 64, 128]`), one kind in a file. Everything wrong is a `UserError` that names the file, the entry and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segvit.contracts import Classes, Color, UserError
from segvit.data.decode import LabelRule
from segvit.palette import generate_palette

SPLITS = ("train", "val", "test")
KEYS = ("path", *SPLITS, "classes", "ignore", "nearest", "channels", "range")
ENTRY_KEYS = ("images", "masks", "list", "exclude")
CLASS_KEYS = ("name", "color", "values")
MAX_CHANNELS = 1024

Raw = int | Color


@dataclass(frozen=True)
class Entry:
    """Where some images and their masks lie: folders or templates with `{stem}`, below the root."""

    images: str
    masks: str
    list: str | None = None  # a text file below the root: one stem a line, only those files take part
    exclude: tuple[str, ...] = ()  # stems or glob patterns that are left out


@dataclass(frozen=True)
class Description:
    """What a dataset YAML says. The files of a split are those of all its entries."""

    root: Path
    splits: dict[str, tuple[Entry, ...]]
    classes: Classes
    rule: LabelRule
    val_part: float | None = None  # the part of train that is kept for val, where `splits` has no val
    channels: int = 3
    range: tuple[float, float] | None = None  # raw levels of images that become 0 and 255
    values: tuple[tuple[Raw, ...], ...] = ()  # raw values of each class as written; empty where nothing was
    ignored: tuple[Raw, ...] = ()


def read_description(path: Path) -> Description:
    """The description in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file in YAML") from None
    return parse_description(text, str(path), path.parent)


def parse_description(text: str, where: str, base: Path) -> Description:
    """The description in the text of a YAML file, which messages call `where`; its `path:` is relative to `base`."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({' '.join(str(error).split())}); mend that line") from None
    data = _mapping(data, KEYS, where)
    if not data.get("classes"):
        raise UserError(f"{where}: no classes; add classes: with one line a class, such as 0: road")
    val_part = _part(data.pop("val"), f"{where}: val") if isinstance(data.get("val"), int | float) else None
    splits = {name: _entries(data[name], f"{where}: {name}") for name in SPLITS if data.get(name) is not None}
    if not splits:
        raise UserError(f"{where}: no train, val or test; add train: {{images: FOLDER, masks: FOLDER}}")
    if val_part is not None and "train" not in splits:
        raise UserError(f"{where}: val: {val_part} is a part of train, but there is no train; add it")
    classes, values = read_classes(data["classes"], f"{where}: classes")
    ignored = _raws(data.get("ignore") or [], f"{where}: ignore")
    nearest = data.get("nearest", False)
    if not isinstance(nearest, bool):
        raise UserError(f"{where}: nearest: found {nearest!r}; write true or false")
    return Description(
        root=base / Path(str(data.get("path") or ".")).expanduser(),
        splits=splits,
        classes=classes,
        rule=label_rule(values, ignored, classes.ignore_index, where, nearest=nearest),
        val_part=val_part,
        channels=_channels(data.get("channels", 3), f"{where}: channels"),
        range=None if data.get("range") is None else _range(data["range"], f"{where}: range"),
        values=tuple(map(tuple, values)),
        ignored=tuple(ignored),
    )


def read_classes(data: Any, where: str) -> tuple[Classes, list[list[Raw]]]:
    """The class table of the `classes:` entry, and the raw values of each class."""
    if isinstance(data, Sequence) and not isinstance(data, str):
        data = dict(enumerate(data))
    if not isinstance(data, Mapping) or sorted(map(repr, data)) != sorted(map(repr, range(len(data)))):
        found = f"ids {list(data)[:10]}" if isinstance(data, Mapping) else repr(data)
        raise UserError(f"{where}: ids must be 0, 1, 2, ... without gaps, found {found}; raw values go under values:")
    defaults = generate_palette(len(data))
    names: list[str] = []
    palette: list[Color] = []
    values: list[list[Raw]] = []
    for index in range(len(data)):
        here = f"{where}: {index}"
        entry = _mapping(data[index] if isinstance(data[index], Mapping) else {"name": data[index]}, CLASS_KEYS, here)
        names.append(_class_name(entry.get("name"), here))
        palette.append(defaults[index] if entry.get("color") is None else _color(entry["color"], f"{here}: color"))
        values.append([index] if entry.get("values") is None else _raws(entry["values"], f"{here}: values"))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: names {twice} occur twice; give every class a name of its own, or merge by values:")
    return Classes(tuple(names), tuple(palette)), values


def read_class_file(path: Path) -> tuple[Classes, list[list[Raw]]]:
    """Classes from a text file, one name a line in id order, optionally a tab and `R G B`; each value is its id.

    Raises UserError when the file is missing or empty.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; write one class name a line there: the first line names the pixels of value 0"
        )
    entries: list[dict[str, object]] = []
    for line in path.read_text(encoding="utf-8").rstrip().splitlines():
        name, has_color, color = line.partition("\t")
        parts = [int(part) if part.isdecimal() else part for part in color.split()]
        entries.append({"name": name, "color": parts} if has_color else {"name": name})
    if not entries:
        raise UserError(f"{path} is empty; write one class name a line: the first names the pixels of value 0")
    return read_classes(entries, str(path))


def label_rule(
    values: Sequence[Sequence[Raw]], ignored: Sequence[Raw], ignore: int, where: str, *, nearest: bool = False
) -> LabelRule:
    """The rule that maps the raw values of class i to i and the ignored ones to the ignore id.

    With `nearest`, other raw values count as the nearest of these.
    """
    table: dict[Raw, int] = dict.fromkeys(ignored, ignore)
    for index, raws in enumerate(values):
        for raw in raws:
            if table.get(raw, index) != index:
                other = "ignore:" if table[raw] == ignore else f"class {table[raw]}"
                raise UserError(f"{where}: value {raw} is in class {index} and in {other}; keep it in one place")
            table[raw] = index
    if nearest and not table:
        raise UserError(f"{where}: no class has values, so there is no nearest one; list them, or drop nearest:")
    numbers = {raw: index for raw, index in table.items() if isinstance(raw, int)}
    colors = {raw: index for raw, index in table.items() if not isinstance(raw, int)}
    if colors and not numbers:
        return LabelRule.of_colors(colors, ignore, nearest=nearest)
    if colors:
        raise UserError(
            f"{where}: values mix numbers ({next(iter(numbers))}) and colours ({list(next(iter(colors)))}); "
            "use one kind, and give values: to every class where masks are painted in colours"
        )
    return LabelRule.of_numbers(numbers, ignore, nearest=nearest)


def _mapping(data: Any, allowed: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: found {data!r} where a mapping is expected; its keys are {', '.join(allowed)}")
    unknown = [key for key in data if key not in allowed]
    if unknown:
        raise UserError(f"{where}: unknown keys {unknown}; allowed are {', '.join(allowed)}")
    return dict(data)


def _entries(data: Any, where: str) -> tuple[Entry, ...]:
    if isinstance(data, int | float):
        raise UserError(f"{where}: only val may be a part of train; write {{images: FOLDER, masks: FOLDER}}")
    if not isinstance(data, list):
        return (_entry(data, where),)
    if not data:
        raise UserError(f"{where}: the list is empty; add {{images: FOLDER, masks: FOLDER}} or remove the split")
    return tuple(_entry(entry, f"{where}: entry {number}") for number, entry in enumerate(data, 1))


def _entry(data: Any, where: str) -> Entry:
    entry = _mapping(data, ENTRY_KEYS, where)
    for key in ("images", "masks"):
        if not isinstance(entry.get(key), str):
            raise UserError(f"{where}: {key}: must name a folder or a template such as {key}/{{stem}}.png")
    listed, excluded = entry.get("list"), entry.get("exclude") or []
    if listed is not None and not isinstance(listed, str):
        raise UserError(f"{where}: list: must name a text file with one stem a line, found {listed!r}")
    if not isinstance(excluded, list) or not all(isinstance(pattern, str) for pattern in excluded):
        raise UserError(f'{where}: exclude: found {excluded!r}; write a list of quoted stems such as ["0001", "bad_*"]')
    return Entry(entry["images"], entry["masks"], listed, tuple(excluded))


def _part(value: float, where: str) -> float:
    if isinstance(value, bool) or not 0 < value < 1:
        raise UserError(f"{where}: {value} is no part of train; write 0.2, say, or {{images: FOLDER, masks: FOLDER}}")
    return float(value)


def _channels(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_CHANNELS:
        raise UserError(f"{where}: found {value!r}; write a whole number such as 1, 3 or 4")
    return value


def _range(data: Any, where: str) -> tuple[float, float]:
    numbers = isinstance(data, list) and len(data) == 2 and all(type(value) in (int, float) for value in data)
    if not numbers or not -math.inf < data[0] < data[1] < math.inf:
        raise UserError(f"{where}: found {data!r}; write the lowest and the highest raw level, such as [0, 10000]")
    return float(data[0]), float(data[1])


def _class_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: the name {value!r} is not text; write it in quotes")
    return value.strip()


def _raws(data: Any, where: str) -> list[Raw]:
    if not isinstance(data, list):
        raise UserError(f"{where}: found {data!r}; write a list such as [7, 8] or [[128, 64, 128]]")
    return [_number(item, where) if isinstance(item, int) else _color(item, where) for item in data]


def _number(value: int, where: str) -> int:
    if isinstance(value, bool) or not 0 <= value <= 65535:
        raise UserError(f"{where}: {value} cannot stand in a mask; values are 0..65535 or colours [R, G, B]")
    return value


def _color(data: Any, where: str) -> Color:
    numbers = isinstance(data, list) and len(data) == 3 and all(type(part) is int for part in data)
    if not numbers or not all(0 <= part <= 255 for part in data):
        raise UserError(f"{where}: {data!r} is no colour; write [R, G, B] with numbers 0..255")
    return data[0], data[1], data[2]
