"""What a comparison leaves to read: a table for a README and a page with charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from segvit.engine import page
from segvit.engine.scatter import Point, scatter
from segvit.files import write_text
from segvit.tasks.console import aligned


class Row(NamedTuple):
    """One candidate of a comparison; None is what was not reached."""

    name: str
    steps: int
    seconds: float = 0.0  # of training
    miou: float | None = None
    macc: float | None = None
    aacc: float | None = None
    parameters: int | None = None
    trained: int | None = None  # of the parameters
    inside: int | None = None  # of those that trained, in the backbone; None without a tuning method
    gflops: float | None = None
    latency: float | None = None  # milliseconds
    error: str | None = None


class Column(NamedTuple):
    """What a table says of each row that came through."""

    title: str
    text: Callable[[Row], str]


class Chart(NamedTuple):
    """mIoU over a cost, above 0, of each row that came through."""

    over: str
    unit: str
    cost: Callable[[Row], float]


class View(NamedTuple):
    """What is compared, and how it is shown."""

    what: str  # many of them
    each: str  # the budget is for so much
    start: str  # where the training starts from
    columns: tuple[Column, ...]  # the first is the name, the last has room for what went wrong
    charts: tuple[Chart, ...]


def millions(count: int | None) -> str:
    """Such as 3.22 M."""
    return f"{(count or 0) / 1e6:.2f} M"


QUALITY = (
    Column("mIoU", lambda row: f"{100 * (row.miou or 0.0):.2f}"),
    Column("pixel accuracy", lambda row: f"{100 * (row.aacc or 0.0):.2f}"),
)
COST = (
    Column("GFLOPs", lambda row: f"{row.gflops or 0.0:.2f}"),
    Column("latency", lambda row: f"{row.latency or 0.0:.1f} ms"),
    Column("steps", lambda row: str(row.steps)),
    Column("training", lambda row: f"{row.seconds / 60:.1f} min"),
)
MODELS = View(
    "models", "a model", "From nothing",
    (
        Column("model", lambda row: row.name), *QUALITY,
        Column("parameters", lambda row: millions(row.parameters)), *COST,
    ),
    (
        Chart("parameters", "million parameters", lambda row: 1e-6 * (row.parameters or 0)),
        Chart("GFLOPs", "GFLOPs", lambda row: row.gflops or 0.0),
        Chart("latency", "milliseconds an image", lambda row: row.latency or 0.0),
    ),
)  # fmt: skip


def cells(row: Row, view: View) -> list[str]:
    """A row of the tables, in the order of the view's columns."""
    if row.error is not None:
        return [row.name, "failed", *[""] * (len(view.columns) - 3), row.error]
    return [column.text(row) for column in view.columns]


def head(view: View) -> list[str]:
    """The titles of the columns."""
    return [column.title for column in view.columns]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The best first, failures last."""
    return sorted(rows, key=lambda row: -1.0 if row.miou is None else row.miou, reverse=True)


def table_text(rows: Sequence[Row], view: View) -> str:
    """The table for a terminal; failures have lines of their own below."""
    good = [cells(row, view) for row in ranked(rows) if row.error is None]
    failures = [f"{row.name} failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([aligned([head(view), *good]) if good else "nothing came through", *failures])


def caption(facts: dict[str, Any]) -> str:
    """How the figures came about, in words."""
    high, wide = facts["crop"]
    where = f"{facts['device']}, {facts['processor']}, {facts['cores']} cores, torch threads {facts['threads']}"
    return (
        f"{facts['data']}: {facts['training images']} training and {facts['validation images']} validation images, "
        f"{facts['classes']} classes. {facts['start']}, {facts['budget']}, crops of {high} x {wide}, batches of "
        f"{facts['batch size']}. GFLOPs (one multiply-add each) and latency (median, one image to its labels, fp32) at "
        f"the crop's size. Measured {facts['date']} on {where}, torch {facts['torch']}, segvit {facts['segvit']}."
    )


def write_comparison(folder: Path, rows: Sequence[Row], facts: dict[str, Any], view: View) -> None:
    """Write compare.md, a table for a README, and index.html."""
    order = ranked(rows)
    lines = ["| " + " | ".join(head(view)) + " |", "|---|" + "---:|" * (len(view.columns) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(row, view)) + " |" for row in order]
    write_text(folder / "compare.md", "\n".join([*lines, "", caption(facts), ""]))
    done = [row for row in order if row.error is None]
    charts = [
        scatter(
            f"mIoU over {chart.over}", [Point(row.name, chart.cost(row), row.miou or 0.0) for row in done],
            unit=chart.unit,
        )
        for chart in view.charts
    ]  # fmt: skip
    linked = [[_link(row), *map(escape, cells(row, view)[1:])] for row in order]
    note = f"Dashed: the {view.what} that nothing cheaper reaches. The cost is on a logarithmic axis."
    sections = [
        f"<p>{escape(caption(facts))}</p>", page.table(head(view), linked),
        f'<div class="grid">{"".join(charts)}</div>' if done else "",
        f"<p>{note}</p>" if len(done) > 1 else "",
    ]  # fmt: skip
    page.write_page(folder / "index.html", f"{len(rows)} {view.what} on {facts['data']}", sections)


def _link(row: Row) -> str:
    """The name, leading to the run's own report where it has one."""
    name = escape(row.name)
    return name if row.error is not None else f'<a href="{name}/report/index.html">{name}</a>'
