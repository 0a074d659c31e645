"""Reads the YAML that describes a dataset: where images and masks lie, which raw value of a mask is which class.

    path: .                                # relative to this file
    train: {images: images/train, masks: masks/train}
    val: {images: images/val, masks: "masks/val/{stem}_mask.png"}
    classes:
      0: {name: road, color: [128, 64, 128], values: [7, 8]}
      1: car                               # short for {name: car, values: [1]}
    ignore: [0]

Raw values are numbers (`7`) or colours (`[128, 64, 128]`), one kind in a file. Everything wrong is a `UserError` that
names the file, the entry and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segvit.contracts import Classes, Color, UserError
from segvit.data.decode import LabelRule
from segvit.palette import generate_palette

SPLITS = ("train", "val", "test")
KEYS = ("path", *SPLITS, "classes", "ignore")
CLASS_KEYS = ("name", "color", "values")

Raw = int | Color


@dataclass(frozen=True)
class Description:
    """What a dataset YAML says: `splits` gives the folder or template of images and of masks, relative to `root`."""

    root: Path
    splits: dict[str, tuple[str, str]]
    classes: Classes
    rule: LabelRule


def read_description(path: Path) -> Description:
    """The description in a YAML file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file in YAML") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); mend that line") from None
    data = _mapping(data, KEYS, f"{path}")
    if not data.get("classes"):
        raise UserError(f"{path}: no classes; add classes: with one line a class, such as 0: road")
    splits = {name: _split(data[name], f"{path}: {name}") for name in SPLITS if data.get(name) is not None}
    if not splits:
        raise UserError(f"{path}: no train, val or test; add train: {{images: FOLDER, masks: FOLDER}}")
    classes, values = read_classes(data["classes"], f"{path}: classes")
    ignored = _raws(data.get("ignore") or [], f"{path}: ignore")
    root = path.parent / Path(str(data.get("path") or ".")).expanduser()
    return Description(root, splits, classes, label_rule(values, ignored, classes.ignore_index, str(path)))


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


def label_rule(values: Sequence[Sequence[Raw]], ignored: Sequence[Raw], ignore: int, where: str) -> LabelRule:
    """The rule that maps the raw values of class i to i and the ignored ones to the ignore id."""
    table: dict[Raw, int] = dict.fromkeys(ignored, ignore)
    for index, raws in enumerate(values):
        for raw in raws:
            if table.get(raw, index) != index:
                other = "ignore:" if table[raw] == ignore else f"class {table[raw]}"
                raise UserError(f"{where}: value {raw} is in class {index} and in {other}; keep it in one place")
            table[raw] = index
    numbers = {raw: index for raw, index in table.items() if isinstance(raw, int)}
    colors = {raw: index for raw, index in table.items() if not isinstance(raw, int)}
    if colors and not numbers:
        return LabelRule.of_colors(colors, ignore)
    if colors:
        raise UserError(
            f"{where}: values mix numbers ({next(iter(numbers))}) and colours ({list(next(iter(colors)))}); "
            "use one kind, and give values: to every class where masks are painted in colours"
        )
    return LabelRule.of_numbers(numbers, ignore)


def _mapping(data: Any, allowed: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: found {data!r} where a mapping is expected; its keys are {', '.join(allowed)}")
    unknown = [key for key in data if key not in allowed]
    if unknown:
        raise UserError(f"{where}: unknown keys {unknown}; allowed are {', '.join(allowed)}")
    return dict(data)


def _split(data: Any, where: str) -> tuple[str, str]:
    entry = _mapping(data, ("images", "masks"), where)
    for key in ("images", "masks"):
        if not isinstance(entry.get(key), str):
            raise UserError(f"{where}: {key}: must name a folder or a template such as {key}/{{stem}}.png")
    return entry["images"], entry["masks"]


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
