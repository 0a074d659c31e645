"""What a run has measured: reading metrics.jsonl, whole or as it grows, and the same as a table. Free of torch."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from segvit.files import write_text

Row = dict[str, Any]  # one line of metrics.jsonl: of a training step, or {"step": ..., "val": {...}} of a validation
METRICS = "metrics.jsonl"


def read_history(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(parse_row, lines) if row is not None]


def parse_row(line: str) -> Row | None:
    """A line of metrics.jsonl; None for what is not whole."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


class Tail:
    """A growing metrics.jsonl, of which only what is new is read; a resumed run puts another file in its place."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.rows: list[Row] = []
        self.file, self.offset = 0, 0

    def read(self) -> list[Row]:
        """All rows up to now; a line that is still being written waits for the next call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return self.rows
        with file:
            found = self.path.stat()
            if found.st_ino != self.file or found.st_size < self.offset:
                self.file, self.offset, self.rows = found.st_ino, 0, []
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        rows = (parse_row(line) for line in whole.decode("utf-8", "replace").splitlines())
        self.rows += [row for row in rows if row is not None]
        return self.rows


def flat(row: Row) -> Row:
    """The row with `val_miou` for what is nested as {"val": {"miou": ...}}."""
    result: Row = {}
    for key, value in row.items():
        result |= {f"{key}_{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return result


def write_csv(folder: Path) -> None:
    """metrics.csv, whole or not at all: one line a step with its validation, one column a key; NaN is empty."""
    steps: dict[int, Row] = {}
    for row in read_history(folder):
        steps.setdefault(row["step"], {}).update(flat(row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file, list(dict.fromkeys(key for row in steps.values() for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(steps.values())
    write_text(folder / "metrics.csv", file.getvalue())
