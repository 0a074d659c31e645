"""Reading foreign files with suspicion: what is not as its format says becomes one line that names file and entry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from segvit.contracts import UserError
from segvit.data.formats.polygons import Points

T = TypeVar("T")
KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
FAR = 1e7  # pixels; a coordinate beyond is no place in any image


def read_text(path: Path) -> str:
    """The text in a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file in UTF-8") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); export the file again") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds."""
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); mend that line") from None


def entry_of(data: Any, key: str, kind: type[T], where: str) -> T:
    """data[key], which must be of `kind`: dict, list, str or int."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: found {shown(data)} where an object is expected; export the file again")
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "missing" if key not in data else shown(value)
        raise UserError(f"{where}: {key} is {found} but must be {KINDS[kind]}; export the file again")
    return value


def key_of(data: Any, key: str, where: str) -> int | str:
    """data[key], which must be a whole number or text: what entries are referred to by."""
    kind: type[int] | type[str] = str if isinstance(data, Mapping) and isinstance(data.get(key), str) else int
    return entry_of(data, key, kind, where)


def number(data: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """data[key] as a finite number, also where it is written as text."""
    value = data.get(key, default)
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if isinstance(value, bool) or not abs(result) < FAR:
        raise UserError(f"{where}: {key} is {shown(value)} but must be a number of pixels or percent; mend that entry")
    return result


def points_of(values: Any, where: str, *, at_least: int = 3) -> Points:
    """Pairs of coordinates from [[x, y], ...] or [x, y, x, y, ...]."""
    try:
        flat = np.array(values, np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise UserError(f"{where}: the points are no list of numbers: {shown(values)}; mend that entry") from None
    nested = isinstance(values, Sequence) and any(isinstance(value, list) and len(value) != 2 for value in values)
    if len(flat) % 2 or nested:
        raise UserError(f"{where}: the points are no pairs of x and y: {shown(values)}; mend that entry")
    if len(flat) < 2 * at_least:
        raise UserError(
            f"{where}: {len(flat) // 2} points but {at_least} or more are needed; mend or delete that entry"
        )
    if not (np.abs(flat) < FAR).all():
        raise UserError(f"{where}: a coordinate is not finite or far away: {shown(values)}; mend that entry")
    return flat.reshape(-1, 2)


def index_of(name: str, names: Mapping[str, int], where: str) -> int:
    """The number of a class name; UserError where the source does not list it."""
    if name not in names:
        listed = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{where}: class {name!r} is not among those listed ({listed}); mend the name or list it")
    return names[name]


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
