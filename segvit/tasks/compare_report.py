"""What a comparison leaves to read: a table for a README and a page with charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from segvit.engine import page
from segvit.engine.scatter import Point, scatter
from segvit.files import write_text
from segvit.tasks.console import aligned

HEAD = ("model", "mIoU", "pixel accuracy", "parameters", "GFLOPs", "latency", "steps", "training")


class Row(NamedTuple):
    """One model of a comparison; None is what was not reached."""

    name: str
    steps: int
    seconds: float = 0.0  # of training
    miou: float | None = None
    macc: float | None = None
    aacc: float | None = None
    parameters: int | None = None
    gflops: float | None = None
    latency: float | None = None  # milliseconds
    error: str | None = None


def cells(row: Row) -> list[str]:
    """A row of the tables, in HEAD's order."""
    if row.error is not None:
        return [row.name, "failed", *[""] * (len(HEAD) - 3), row.error]
    assert row.miou is not None  # a row without an error is complete
    assert row.aacc is not None
    assert row.parameters is not None
    assert row.gflops is not None
    assert row.latency is not None
    return [
        row.name, f"{100 * row.miou:.2f}", f"{100 * row.aacc:.2f}", f"{row.parameters / 1e6:.2f} M",
        f"{row.gflops:.2f}", f"{row.latency:.1f} ms", str(row.steps), f"{row.seconds / 60:.1f} min",
    ]  # fmt: skip


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The best first, failures last."""
    return sorted(rows, key=lambda row: -1.0 if row.miou is None else row.miou, reverse=True)


def table_text(rows: Sequence[Row]) -> str:
    """The table for a terminal; failures have lines of their own below."""
    good = [cells(row) for row in ranked(rows) if row.error is None]
    failures = [f"{row.name} failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([aligned([HEAD, *good]) if good else "no model came through", *failures])


def caption(facts: dict[str, Any]) -> str:
    """How the figures came about, in words."""
    high, wide = facts["crop"]
    where = f"{facts['device']}, {facts['processor']}, {facts['cores']} cores, torch threads {facts['threads']}"
    return (
        f"{facts['data']}: {facts['training images']} training and {facts['validation images']} validation images, "
        f"{facts['classes']} classes. From nothing, {facts['budget']}, crops of {high} x {wide}, batches of "
        f"{facts['batch size']}. GFLOPs (one multiply-add each) and latency (median, one image to its labels, fp32) at "
        f"the crop's size. Measured {facts['date']} on {where}, torch {facts['torch']}, segvit {facts['segvit']}."
    )


def write_comparison(folder: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write compare.md, a table for a README, and index.html."""
    order = ranked(rows)
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |" for row in order]
    write_text(folder / "compare.md", "\n".join([*lines, "", caption(facts), ""]))
    done = [row for row in order if row.error is None]
    charts = [
        scatter(f"mIoU over {what}", [Point(row.name, cost(row, scale), row.miou or 0.0) for row in done], unit=unit)
        for what, unit, cost, scale in (
            ("parameters", "million parameters", _parameters, 1e-6), ("GFLOPs", "GFLOPs", _gflops, 1.0),
            ("latency", "milliseconds an image", _latency, 1.0),
        )
    ]  # fmt: skip
    linked = [[_link(row), *map(escape, cells(row)[1:])] for row in order]
    sections = [
        f"<p>{escape(caption(facts))}</p>", page.table(HEAD, linked),
        f'<div class="grid">{"".join(charts)}</div>' if done else "",
        "<p>Dashed: the models that nothing cheaper reaches. The cost is on a logarithmic axis.</p>" if done else "",
    ]  # fmt: skip
    page.write_page(folder / "index.html", f"{len(rows)} models on {facts['data']}", sections)


def _parameters(row: Row, scale: float) -> float:
    return scale * (row.parameters or 0)


def _gflops(row: Row, scale: float) -> float:
    return scale * (row.gflops or 0.0)


def _latency(row: Row, scale: float) -> float:
    return scale * (row.latency or 0.0)


def _link(row: Row) -> str:
    """The name, leading to the model's own report where it has one."""
    name = escape(row.name)
    return name if row.error is not None else f'<a href="{name}/report/index.html">{name}</a>'
